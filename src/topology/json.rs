//! As much of JSON as reports write.

use std::fmt;

/// A JSON value.
#[derive(Debug)]
pub enum Json {
    /// Nothing.
    Null,
    /// True or false.
    Bool(bool),
    /// A whole number.
    Number(u64),
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// Members in this order.
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    /// What something is shown as.
    pub fn text(text: &(impl ToString + ?Sized)) -> Self {
        Self::Text(text.to_string())
    }

    /// A list with a value for each item.
    pub fn list<T>(items: impl IntoIterator<Item = T>, of: impl Fn(T) -> Self) -> Self {
        Self::List(items.into_iter().map(of).collect())
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(is_so) => write!(f, "{is_so}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => quote(text, f),
            Self::List(items) => {
                f.write_str("[")?;
                for (at, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if at == 0 { "" } else { "," })?;
                }
                f.write_str("]")
            }
            Self::Object(members) => {
                f.write_str("{")?;
                for (at, (name, value)) in members.iter().enumerate() {
                    f.write_str(if at == 0 { "" } else { "," })?;
                    quote(name, f)?;
                    write!(f, ":{value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

fn quote(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            c if u32::from(c) < 0x20 => write!(f, "\\u{:04x}", u32::from(c))?,
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}

#[cfg(test)]
mod tests {
    use super::Json;

    #[test]
    fn values_are_written_as_the_rfc_wants_them() {
        let value = Json::Object(vec![
            ("a", Json::List(vec![Json::Number(1), Json::Null])),
            ("b", Json::text("x\"\\\n\u{e9}")),
        ]);
        assert_eq!(value.to_string(), "{\"a\":[1,null],\"b\":\"x\\\"\\\\\\u000a\u{e9}\"}");
    }
}
