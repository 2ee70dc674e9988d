//! Bytes at a position: of a file, of a model built into the program, made up as they are read, or translated from GGUF.
//!
//! Positioned reads instead of a memory map: a file that shrinks while it is open gives an error,
//! where a map gives SIGBUS, and the pages of a tensor already read do not stay in the process.

use std::{borrow::Cow, fs::File, io, path::Path};

use super::{generated::Generated, gguf::View};
use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) enum Source {
    File { file: File, len: u64 },
    Memory(Cow<'static, [u8]>),
    Generated(Generated),
    Gguf(View),
}

impl Source {
    /// Opens a regular file (a FIFO would block, a device has no length).
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if !metadata.is_file() {
            let reason = "not a regular file".to_owned();
            return Err(Error::Checkpoint { path: path.into(), reason });
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        Ok(Self::File { file, len })
    }

    /// Bytes in all, as of opening.
    pub fn len(&self) -> u64 {
        match self {
            Self::File { len, .. } => *len,
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Generated(file) => file.len(),
            Self::Gguf(view) => view.len(),
        }
    }

    /// Fills `buffer` from the bytes at `offset`; fails when the source ends before.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            #[cfg(unix)]
            Self::File { file, .. } => {
                std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
            }
            #[cfg(windows)]
            Self::File { file, .. } => seek_read_exact(file, buffer, offset),
            Self::Memory(bytes) => {
                let found = usize::try_from(offset)
                    .ok()
                    .and_then(|start| bytes.get(start..)?.get(..buffer.len()))
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(found);
                Ok(())
            }
            Self::Generated(file) => file.read_exact_at(buffer, offset),
            Self::Gguf(view) => view.read_exact_at(buffer, offset),
        }
    }
}

#[cfg(windows)]
fn seek_read_exact(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buffer.is_empty() {
        match file.seek_read(buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
