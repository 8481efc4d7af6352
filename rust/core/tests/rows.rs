//! Odd rows against a plain loop over lines.

use proptest::prelude::*;
use safelora_fast_core::rows::odd_rows;

const ROW: &str = r#"{"prompt": "a", "completion": "b"}"#;

fn lines() -> impl Strategy<Value = Vec<(String, bool)>> {
    let long = format!(r#"{{"prompt": "{}", "completion": "b"}}"#, "long ".repeat(20_000));
    let line = prop_oneof![
        4 => Just((ROW.to_owned(), false)),
        2 => Just((format!("{ROW} \r"), false)),
        1 => Just((long, false)),
        1 => Just((String::new(), false)),
        1 => Just((" \t\x0b\x0c\r".to_owned(), false)),
        1 => Just(("{}".to_owned(), true)),
        1 => Just(("x".repeat(70_000), true)),
    ];
    prop::collection::vec(line, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn odd_rows_are_those_of_a_plain_loop(lines in lines(), ended in any::<bool>(), threads in 1..4_usize) {
        let mut content = String::new();
        let mut expected = Vec::new();
        for (line, odd) in &lines {
            if *odd {
                expected.push(content.len());
            }
            content.push_str(line);
            content.push('\n');
        }
        if !ended {
            content.pop();
        }
        prop_assert_eq!(odd_rows(content.as_bytes(), threads), expected);
    }
}

#[test]
fn every_line_is_looked_at_once() {
    let content = "{}\n".repeat(400_000);
    let expected: Vec<usize> = (0..400_000).map(|line| 3 * line).collect();
    for threads in [1, 2, 5] {
        assert_eq!(odd_rows(content.as_bytes(), threads), expected);
    }
}
