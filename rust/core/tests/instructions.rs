//! Counts the instructions of the products under valgrind's callgrind, which noise does not reach: a kernel that spills
//! its sums or decodes a weight twice fails here, on any machine. Without valgrind nothing is counted.

use std::process::Command;

use safelora_fast_core::kernels::{Difference, Dtype, Engine, Level, Matrix};

const SIZE: usize = 512;
const CASE: &str = "SAFELORA_FAST_TEST_CASE";

/// Runs in a process of its own: one product, named by the environment, with AVX2, which valgrind knows.
#[test]
#[ignore = "the other test counts its instructions"]
fn one_product() {
    let case = std::env::var(CASE).expect("the other test sets it");
    let (product, rank) = case.split_once(' ').expect("a product and a rank");
    let rank: usize = rank.parse().expect("a number");
    let bytes = vec![0x3c_u8; 2 * SIZE * SIZE];
    let matrix = Matrix::new(&bytes, Dtype::Bf16, SIZE, SIZE, SIZE).expect("it fits");
    let v = Difference::new(matrix, matrix).expect("one shape");
    let mut engine = Engine::new(1, Level::Avx2).expect("the CPU has AVX2");
    let (x, mut y) = (vec![0.5; rank * SIZE], vec![0.0; rank * SIZE]);
    if product == "transposed" {
        engine.transposed_product(&v, &x, rank, &mut y).expect("shapes fit");
    } else {
        engine.product(&v, &x, rank, &mut y).expect("shapes fit");
    }
}

fn instructions(product: &str, rank: usize) -> f64 {
    let this = std::env::current_exe().expect("a test has a path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(this)
        .args(["--ignored", "--exact", "one_product"])
        .env(CASE, format!("{product} {rank}"))
        .output()
        .expect("valgrind runs");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let count = words.lines().find_map(|line| line.split_once("Collected :")).map(|(_, count)| count.trim().to_owned());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no count: {words}"))
}

#[test]
fn instructions_of_a_multiply_add() {
    let has_valgrind = Command::new("valgrind").arg("--version").output().is_ok();
    if !has_valgrind || !Level::Avx2.is_available() {
        eprintln!("nothing is counted: it takes valgrind and AVX2");
        return;
    }
    // One instruction multiplies and adds eight lanes; the rest are loads, stores, and loops. When this was written, the
    // counts were 3.5, 3.1, and 3.1. The difference of two ranks leaves out what V costs once.
    for (product, few, many, most) in
        [("transposed", 8, 24, 4.0), ("transposed", 32, 64, 3.6), ("product", 32, 64, 3.6)]
    {
        let more = instructions(product, many) - instructions(product, few);
        let each = more / ((SIZE * SIZE * (many - few)) as f64 / 8.0);
        assert!(each < most, "{product}, {few} to {many} vectors: {each:.2} instructions instead of {most}");
    }
}
