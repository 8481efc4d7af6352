//! One line: recognised while it is parsed, of which nothing is kept.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Roles of turns.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Whether a line is certainly a row.
pub(super) fn is_row(line: &[u8]) -> bool {
    // Not from_slice: text that is UTF-8 as a whole needs no check of each of its strings.
    std::str::from_utf8(line).is_ok_and(|text| serde_json::from_str::<Row>(text).is_ok())
}

/// A field of a row.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Column {
    Messages,
    Prompt,
    Completion,
    Tools,
    #[serde(other)]
    Other,
}

/// A row of `messages`, or of `prompt` and `completion`.
struct Row;

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RowVisitor)
    }
}

struct RowVisitor;

impl<'de> Visitor<'de> for RowVisitor {
    type Value = Row;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a row")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Row, A::Error> {
        let (mut messages, mut prompt, mut completion) = (None, None, None);
        while let Some(column) = fields.next_key()? {
            let before = match column {
                Column::Messages => messages.replace(fields.next_value()?),
                Column::Prompt => prompt.replace(fields.next_value()?),
                Column::Completion => completion.replace(fields.next_value()?),
                Column::Tools => return Err(A::Error::custom("tools")),
                Column::Other => {
                    fields.next_value::<Anything>()?;
                    None
                }
            };
            if before.is_some() {
                return Err(A::Error::custom("a field comes twice"));
            }
        }
        match (messages, prompt, completion) {
            (Some(Part::Turns), None, None) => Ok(Row),
            (None, Some(prompt), Some(completion)) if prompt == completion => Ok(Row),
            _ => Err(A::Error::custom("fields")),
        }
    }
}

/// What a field of a row holds.
#[derive(PartialEq)]
enum Part {
    Text,
    Turns,
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PartVisitor)
    }
}

struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = Part;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("text or turns")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Part, E> {
        Ok(Part::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut turns: A) -> Result<Part, A::Error> {
        let mut count = 0_usize;
        while let Some(Turn) = turns.next_element()? {
            count += 1;
        }
        if count == 0 { Err(A::Error::custom("no turns")) } else { Ok(Part::Turns) }
    }
}

/// A field of a turn.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Role,
    Content,
    ToolCalls,
    #[serde(other)]
    Other,
}

/// A role, and what was said.
struct Turn;

impl<'de> Deserialize<'de> for Turn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TurnVisitor)
    }
}

struct TurnVisitor;

impl<'de> Visitor<'de> for TurnVisitor {
    type Value = Turn;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a turn")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Turn, A::Error> {
        let (mut roles, mut contents) = (0_usize, 0_usize);
        while let Some(field) = fields.next_key()? {
            match field {
                Field::Role => {
                    fields.next_value::<Role>()?;
                    roles += 1;
                }
                Field::Content => {
                    fields.next_value::<Text>()?;
                    contents += 1;
                }
                Field::ToolCalls => return Err(A::Error::custom("tool_calls")),
                Field::Other => {
                    fields.next_value::<Anything>()?;
                }
            }
        }
        if (roles, contents) == (1, 1) { Ok(Turn) } else { Err(A::Error::custom("fields")) }
    }
}

/// A word that is a known role.
struct Role;

impl<'de> Deserialize<'de> for Role {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(RoleVisitor)
    }
}

struct RoleVisitor;

impl Visitor<'_> for RoleVisitor {
    type Value = Role;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a role")
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<Role, E> {
        if ROLES.contains(&word) { Ok(Role) } else { Err(E::custom("role")) }
    }
}

/// Any text.
struct Text;

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor)
    }
}

struct TextVisitor;

impl Visitor<'_> for TextVisitor {
    type Value = Text;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("text")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Text, E> {
        Ok(Text)
    }
}

/// Any value, read to its bottom: serde's own `IgnoredAny` lets numbers of any length and nesting of any depth pass.
struct Anything;

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnythingVisitor)
    }
}

struct AnythingVisitor;

impl<'de> Visitor<'de> for AnythingVisitor {
    type Value = Anything;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Anything, A::Error> {
        while let Some(Anything) = values.next_element()? {}
        Ok(Anything)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Anything, A::Error> {
        while let Some((_, Anything)) = fields.next_entry::<IgnoredAny, _>()? {}
        Ok(Anything)
    }
}

#[cfg(test)]
mod tests {
    use super::is_row;

    #[test]
    fn rows_are_known() {
        for row in [
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            r#" {"messages": [{"content": "\u00e9\n", "role": "tool", "name": null}, {"role": "developer", "content": ""}]} "#,
            r#"{"prompt": "", "completion": "☂", "id": -1.5e300, "more": {"a": [true, 12345678901234567890, "b"]}}"#,
            r#"{"completion": [{"role": "assistant", "content": "b"}], "prompt": [{"role": "system", "content": "a"}]}"#,
            r#"{"pr\u006fmpt": "a", "completion": "b"}"#,
        ] {
            assert!(is_row(row.as_bytes()), "{row}");
        }
    }

    #[test]
    fn others_are_not() {
        let deep = format!(r#"{{"prompt": "a", "completion": "b", "x": {}{}}}"#, "[".repeat(200), "]".repeat(200));
        let long = format!(r#"{{"prompt": "a", "completion": "b", "x": {}}}"#, "9".repeat(5000));
        for line in [
            "{",
            "[]",
            "{}",
            "null",
            deep.as_str(),
            long.as_str(),
            r#"{"prompt": "a", "completion": "b"} {}"#,
            r#"{"prompt": "a", "completion": "b", "x": 1e999}"#,
            r#"{"prompt": "a", "completion": "b", "x": NaN}"#,
            r#"{"prompt": "a", "completion": "b", "x": "\ud800"}"#,
            r#"{"prompt": "a", "completion": "b", "x": 1"#,
            r#"{"prompt": "a"}"#,
            r#"{"prompt": "a", "prompt": "a", "completion": "b"}"#,
            r#"{"prompt": "a", "completion": null}"#,
            r#"{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}"#,
            r#"{"prompt": "a", "completion": "b", "tools": null}"#,
            r#"{"prompt": "a", "completion": "b", "messages": [{"role": "user", "content": "b"}]}"#,
            r#"{"messages": "a"}"#,
            r#"{"messages": []}"#,
            r#"{"messages": [["user", "a"]]}"#,
            r#"{"messages": [{"role": "user"}]}"#,
            r#"{"messages": [{"role": "bot", "content": "a"}]}"#,
            r#"{"messages": [{"role": {"user": null}, "content": "a"}]}"#,
            r#"{"messages": [{"role": "user", "content": 1}]}"#,
            r#"{"messages": [{"role": "user", "content": "a", "role": "bot"}]}"#,
            r#"{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}"#,
        ] {
            assert!(!is_row(line.as_bytes()), "{line}");
        }
        assert!(!is_row(b"{\"prompt\": \"\xff\", \"completion\": \"b\"}"));
    }
}
