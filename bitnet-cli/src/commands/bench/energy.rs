//! Energy of the processor packages, as the kernel counts it: RAPL through `/sys/class/powercap`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where the counters are.
const FOLDER: &str = "/sys/class/powercap";

/// The counters of all packages, or why there are none.
#[derive(Debug)]
pub struct Energy(Result<Vec<Package>, String>);

/// A counter of microjoules that begins again at its range.
#[derive(Debug)]
struct Package {
    counter: PathBuf,
    range: u64,
}

/// The counters at one time.
#[derive(Debug)]
pub struct Reading(Vec<u64>);

impl Energy {
    /// The counters of this machine.
    pub fn open() -> Self {
        Self::open_in(Path::new(FOLDER))
    }

    fn open_in(folder: &Path) -> Self {
        let found = packages(folder).and_then(|packages| match packages.is_empty() {
            true => Err(format!("{} counts no processor package", folder.display())),
            false => Ok(packages),
        });
        let energy = Self(found);
        match energy.read() {
            Err(reason) => Self(Err(reason)),
            Ok(_) => energy,
        }
    }

    /// Why energy is not measured, if so.
    pub fn reason(&self) -> Option<&str> {
        self.0.as_ref().err().map(String::as_str)
    }

    /// The counters now; `None` if there are none.
    pub fn now(&self) -> Option<Reading> {
        self.read().ok()
    }

    fn read(&self) -> Result<Reading, String> {
        let packages = self.0.as_ref().map_err(Clone::clone)?;
        packages
            .iter()
            .map(|package| number(&package.counter))
            .collect::<Result<_, _>>()
            .map(Reading)
    }

    /// Joules since `earlier`, less than one range of the counters ago.
    pub fn since(&self, earlier: &Reading) -> Option<f64> {
        let (packages, now) = (self.0.as_ref().ok()?, self.now()?);
        let counters = packages.iter().zip(&earlier.0).zip(now.0);
        let micro = counters.map(|((package, &before), after)| match after >= before {
            true => after - before,
            false => package.range.saturating_sub(before) + after,
        });
        Some(micro.sum::<u64>() as f64 * 1e-6)
    }
}

/// Domains of which no other is a part.
fn packages(folder: &Path) -> Result<Vec<Package>, String> {
    let in_words = |error: io::Error| format!("{}: {error}", folder.display());
    let mut packages = Vec::new();
    for entry in fs::read_dir(folder).map_err(in_words)? {
        let path = entry.map_err(in_words)?.path();
        let is_package =
            fs::read_to_string(path.join("name")).is_ok_and(|name| name.starts_with("package"));
        if is_package {
            let range = number(&path.join("max_energy_range_uj"))?;
            packages.push(Package { counter: path.join("energy_uj"), range });
        }
    }
    Ok(packages)
}

fn number(path: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    text.trim().parse().map_err(|_| format!("{}: `{}` is no number", path.display(), text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(folder: &Path, domain: &str, name: &str, counter: &str) {
        let folder = folder.join(domain);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("name"), name).unwrap();
        fs::write(folder.join("energy_uj"), counter).unwrap();
        fs::write(folder.join("max_energy_range_uj"), "1000000\n").unwrap();
    }

    #[test]
    fn packages_are_added_up_and_counters_wrap() {
        let folder = tempfile::tempdir().unwrap();
        domain(folder.path(), "intel-rapl:0", "package-0\n", "999000\n");
        domain(folder.path(), "intel-rapl:1", "package-1\n", "100\n");
        domain(folder.path(), "intel-rapl:0:0", "core\n", "5\n");
        let energy = Energy::open_in(folder.path());
        assert_eq!(energy.reason(), None);
        let before = energy.now().unwrap();
        fs::write(folder.path().join("intel-rapl:0/energy_uj"), "500").unwrap();
        fs::write(folder.path().join("intel-rapl:1/energy_uj"), "600").unwrap();
        let joules = energy.since(&before).unwrap();
        assert!((joules - 2e-3).abs() < 1e-9, "{joules}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let energy = Energy::open_in(folder.path());
        assert!(energy.reason().unwrap().ends_with("counts no processor package"));
        domain(folder.path(), "intel-rapl:0", "package-0\n", "?");
        let energy = Energy::open_in(folder.path());
        assert!(energy.reason().unwrap().ends_with("energy_uj: `?` is no number"), "{energy:?}");
        assert!(energy.now().is_none());
        let energy = Energy::open_in(&folder.path().join("none"));
        assert!(energy.reason().unwrap().contains("none: "));
    }
}
