//! NIXL's `SerDes` blobs: a magic, then fields of `tag`, u64 length, bytes, `|`, read in the order written.

use crate::error::{Error, Result, Status};

const MAGIC: &[u8] = b"nixlSerDes|";
const END_OF_FIELD: u8 = b'|';

/// Writes a blob.
#[derive(Debug, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A blob without fields.
    pub fn new() -> Self {
        Self { bytes: MAGIC.to_vec() }
    }

    /// Appends a field. The tag has no length of its own: the reader must know it.
    pub fn field(&mut self, tag: &str, value: &[u8]) {
        self.bytes.extend_from_slice(tag.as_bytes());
        self.bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.push(END_OF_FIELD);
    }

    /// The blob.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads a blob, field by field.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts behind the magic.
    pub fn new(blob: &'a [u8]) -> Result<Self> {
        let rest = blob.strip_prefix(MAGIC).ok_or_else(|| malformed("does not start with `nixlSerDes|`"))?;
        Ok(Self { rest })
    }

    /// The next field, which must have this tag.
    pub fn field(&mut self, tag: &str) -> Result<&'a [u8]> {
        let after_tag = self
            .rest
            .strip_prefix(tag.as_bytes())
            .ok_or_else(|| malformed(format!("field `{tag}` is missing")))?;
        let (len, after_len) =
            after_tag.split_first_chunk().ok_or_else(|| malformed(format!("field `{tag}` has no length")))?;
        let len = u64::from_le_bytes(*len);
        let value = usize::try_from(len).ok().and_then(|len| after_len.split_at_checked(len));
        let Some((value, [END_OF_FIELD, rest @ ..])) = value else {
            return Err(malformed(format!(
                "field `{tag}` claims {len} bytes and its end mark; {} bytes are left",
                after_len.len()
            )));
        };
        self.rest = rest;
        Ok(value)
    }

    /// The next field if it has this tag; `None` if something else, or nothing, follows.
    pub fn optional_field(&mut self, tag: &str) -> Result<Option<&'a [u8]>> {
        if self.rest.starts_with(tag.as_bytes()) { self.field(tag).map(Some) } else { Ok(None) }
    }

    /// The next field, which must have this tag and exactly `N` bytes.
    pub fn fixed<const N: usize>(&mut self, tag: &str) -> Result<[u8; N]> {
        let value = self.field(tag)?;
        value.try_into().map_err(|_| malformed(format!("field `{tag}` has {} bytes, not {N}", value.len())))
    }
}

/// An error about bytes that a peer wrote.
pub(crate) fn malformed(what: impl Into<String>) -> Error {
    Error::new(Status::Mismatch, what)
}
