//! Memory of this process, from `/proc/self/status`; unknown on systems without it.

use super::Memory;

/// What is resident now, and the most that ever was.
pub fn memory() -> Option<Memory> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn parse(status: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kibibytes << 10)
    };
    Some(Memory { resident_bytes: field("VmRSS:")?, peak_bytes: field("VmHWM:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let status = "Name:\tbitnet\nVmPeak:\t  900 kB\nVmHWM:\t   12 kB\nVmRSS:\t    8 kB\n";
        let memory = parse(status).unwrap();
        assert_eq!((memory.resident_bytes, memory.peak_bytes), (8 << 10, 12 << 10));
        assert_eq!(parse("Name:\tbitnet\n"), None);
    }
}
