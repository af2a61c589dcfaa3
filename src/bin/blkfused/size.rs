//! Sizes as people write and read them.

use std::fmt;

/// The largest length a file can have.
pub const MAX: u64 = i64::MAX as u64;

const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// Reads a number of bytes, optionally with a binary unit: `1000001`, `64M`,
/// `64MiB`, `8g`. The error is a reason that fits behind the text.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match shift_of(unit) {
        Some(shift) if !number.is_empty() => shift,
        _ => {
            return Err(
                "not a size; write a number of bytes, or one with a unit such as 64M, 8G or 1T"
                    .into(),
            );
        }
    };
    let bytes = number.bytes().try_fold(0u64, |sum, digit| {
        sum.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    });
    bytes
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|n| *n <= MAX)
        .ok_or_else(|| format!("too large; the largest size is {MAX} bytes"))
}

/// How many bits a unit shifts its number by.
fn shift_of(unit: &str) -> Option<u32> {
    let mut chars = unit.chars();
    let Some(first) = chars.next() else {
        return Some(0);
    };
    let power = UNITS
        .iter()
        .zip(1..)
        .find(|(unit, _)| **unit == first.to_ascii_uppercase())?
        .1;
    matches!(chars.as_str(), "" | "iB").then_some(10 * power)
}

/// Shows a size in the largest unit that divides it, else in bytes.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let power = (self.0.trailing_zeros() / 10).min(6);
        match power {
            1.. if self.0 != 0 => write!(
                f,
                "{} {}iB",
                self.0 >> (10 * power),
                UNITS[power as usize - 1]
            ),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_have_a_binary_unit() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("1000001"), Ok(1_000_001));
        assert_eq!(parse("64M"), Ok(64 << 20));
        assert_eq!(parse("64MiB"), Ok(64 << 20));
        assert_eq!(parse("8g"), Ok(8 << 30));
        assert_eq!(parse("1T"), Ok(1 << 40));
        assert_eq!(parse("7E"), Ok(7 << 60));
        assert_eq!(parse("9223372036854775807"), Ok(MAX));
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for bad in [
            "", "M", "-1", "1.5G", "64MB", "64 M", "0x10", "12Q", "1Mi", "٣",
        ] {
            assert!(parse(bad).unwrap_err().starts_with("not a size"), "{bad}");
        }
        for big in ["9223372036854775808", "8E", "99999999999999999999T"] {
            assert!(parse(big).unwrap_err().starts_with("too large"), "{big}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        assert_eq!(Size(0).to_string(), "0 bytes");
        assert_eq!(Size(1_000_001).to_string(), "1000001 bytes");
        assert_eq!(Size(1536).to_string(), "1536 bytes");
        assert_eq!(Size(64 << 20).to_string(), "64 MiB");
        assert_eq!(Size(1 << 62).to_string(), "4 EiB");
    }
}
