//! Sizes of files as they are given.

/// Bytes, with a unit that is a power of ten or of two.
pub fn parse(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("B", 1),
    ];
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = if unit.is_empty() { "B" } else { unit.trim() };
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
    let bytes = number.parse::<u64>().ok().zip(factor).and_then(|(n, (_, f))| n.checked_mul(*f));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| {
        "a size is a whole number of B, KB, MB, GB, KiB, MiB or GiB, such as 5GB".into()
    })
}
