//! `--stats-file`: what `/stats` says, for whoever reads files.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{app::App, status};

/// Where statistics go besides, and how often.
pub struct StatsFile {
    pub path: PathBuf,
    pub every: Duration,
}

impl StatsFile {
    /// Replaces the file as a whole: whoever reads it finds one state or the next.
    pub fn write(&self, app: &App) -> io::Result<()> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
        writeln!(file, "{}", status::statistics(app))?;
        // Whoever watches may be another user, whatever the umask that keeps this one's other files secret.
        #[cfg(unix)]
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.as_file().sync_data()?;
        file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
    }
}
