//! One file from the Hub into the cache: resumed, verified, visible only when whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::{
    Body,
    http::{HeaderMap, Response, StatusCode},
};

use super::{
    cache::{RepoCache, create_parent},
    client::{Client, Failure, Metadata, text},
};
use crate::Error;

const BUFFER_BYTES: usize = 128 << 10;
/// A file whose size no header states is a small one that the server compresses or chunks.
const MAX_UNSIZED_BYTES: u64 = 64 << 20;
const BAR: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";

/// Makes `file` of `commit` present in the cache.
pub(super) fn fetch(
    client: &Client,
    cache: &RepoCache,
    commit: &str,
    file: &str,
    progress: bool,
) -> Result<(), Failure> {
    let url = client.file_url(cache.repo_id(), commit, file);
    let mut backoff = client.backoff();
    let metadata = loop {
        match client.metadata(&url) {
            Ok(metadata) => break metadata,
            Err(failure) => backoff.wait(failure)?,
        }
    };
    let blob = cache.blob(&metadata.etag);
    create_parent(&blob)?;
    let lock = cache.lock(&metadata.etag)?;
    if !is_complete(&blob, metadata.size) {
        let mut part_name = blob.clone().into_os_string();
        if lock.is_none() {
            // Without locks another process may be at work on the same blob: keep apart, give up resuming.
            part_name.push(format!(".{:08x}", rand::random::<u32>()));
        }
        part_name.push(".incomplete");
        let part = PathBuf::from(part_name);
        let bar = progress_bar(file, metadata.size, progress);
        download(client, &url, &metadata, &part, &bar)?;
        fs::rename(&part, &blob).map_err(Error::io(&blob))?;
        bar.finish();
    }
    cache.link(commit, file, &blob, &metadata.etag)?;
    Ok(())
}

fn is_complete(blob: &Path, size: Option<u64>) -> bool {
    fs::metadata(blob).is_ok_and(|found| size.is_none_or(|size| size == found.len()))
}

/// Brings `part` up to the whole content, however many requests it takes.
fn download(
    client: &Client,
    url: &str,
    metadata: &Metadata,
    part: &Path,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(part)
        .map_err(Error::io(part))?;
    let mut backoff = client.backoff();
    let mut longest = file.metadata().map_err(Error::io(part))?.len();
    loop {
        let failure = match receive(client, url, metadata.size, &mut file, part, bar) {
            Ok(()) => match verify(&mut file, &metadata.etag).map_err(Error::io(part))? {
                true => break,
                false => {
                    restart(&mut file, part)?;
                    Failure::transient("the content does not have the SHA-256 that the Hub names")
                }
            },
            Err(failure) => failure,
        };
        // A slow line may break any number of times, as long as each try brings the file further than any before.
        let length = file.metadata().map_err(Error::io(part))?.len();
        if length > longest {
            longest = length;
            backoff.reset();
        }
        backoff.wait(failure)?;
    }
    file.sync_all().map_err(Error::io(part))?;
    Ok(())
}

/// One request for what `file` still lacks.
fn receive(
    client: &Client,
    url: &str,
    size: Option<u64>,
    file: &mut File,
    path: &Path,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut length = file.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
    if size.is_some_and(|size| length > size) {
        restart(file, path)?;
        length = 0;
    }
    if size == Some(length) {
        return Ok(());
    }
    let response = match client.get(url, length) {
        Err(Failure::Refused { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) => {
            restart(file, path)?;
            return Err(Failure::transient("the server refused to resume"));
        }
        response => response?,
    };
    let (start, total) = extent(&response);
    // Before anything is given up: a proxy's error page is no reason to start over.
    if let (Some(size), Some(total)) = (size, total)
        && size != total
    {
        let reason = format!("the file has {size} bytes, the server sends one of {total}");
        return Err(Failure::transient(reason));
    }
    if start != length {
        restart(file, path)?;
        length = 0;
        if start != 0 {
            return Err(Failure::transient("the server sent another range than asked for"));
        }
    }
    let total = size.or(total);
    bar.set_length(total.unwrap_or(0));
    bar.set_position(length);

    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(broken(error, length, total)),
        };
        if read as u64 > total.unwrap_or(MAX_UNSIZED_BYTES).saturating_sub(length) {
            restart(file, path)?;
            return Err(Failure::transient("the server sent more bytes than the file has"));
        }
        file.write_all(&buffer[..read]).map_err(|error| full_or_other(error, path))?;
        length += read as u64;
        bar.set_position(length);
    }
    match total {
        Some(total) if length < total => {
            Err(broken(io::ErrorKind::UnexpectedEof.into(), length, Some(total)))
        }
        _ => Ok(()),
    }
}

fn broken(error: io::Error, length: u64, total: Option<u64>) -> Failure {
    let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
    Failure::transient(format!("{} after {length}{of} bytes", ureq::Error::from(error)))
}

/// Where the body of a response starts in the file, and how long the whole file is.
fn extent(response: &Response<Body>) -> (u64, Option<u64>) {
    let number = |headers: &HeaderMap, name| text(headers, name)?.trim().parse().ok();
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return (0, number(response.headers(), "content-length"));
    }
    // `bytes 10-99/100`, or `*` for an unknown length
    let range = text(response.headers(), "content-range").unwrap_or_default();
    let parsed = range.strip_prefix("bytes ").and_then(|range| {
        let (span, total) = range.split_once('/')?;
        let (start, _) = span.split_once('-')?;
        Some((start.trim().parse().ok()?, total.trim().parse().ok()))
    });
    parsed.unwrap_or((u64::MAX, None))
}

fn restart(file: &mut File, path: &Path) -> Result<(), Error> {
    file.set_len(0).and_then(|()| file.rewind()).map_err(Error::io(path))
}

/// Whether the content has the hash that its etag states; an etag of another kind states none.
fn verify(file: &mut File, etag: &str) -> io::Result<bool> {
    if etag.len() != 64 || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(true);
    }
    file.rewind()?;
    let mut hasher = Sha256::new();
    io::copy(file, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()).eq_ignore_ascii_case(etag))
}

fn full_or_other(error: io::Error, path: &Path) -> Error {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let source = match error.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => io::Error::new(
            error.kind(),
            format!(
                "{error}: free some space, or set HF_HUB_CACHE to a larger disk; the download will go on from here"
            ),
        ),
        _ => error,
    };
    Error::Io { path: path.to_path_buf(), source }
}

fn progress_bar(file: &str, size: Option<u64>, progress: bool) -> ProgressBar {
    if !progress {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(size, ProgressDrawTarget::stderr());
    bar.with_style(style).with_message(file.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_well_formed() {
        ProgressStyle::with_template(BAR).unwrap();
    }

    #[test]
    fn only_a_sha256_is_compared() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc").unwrap();
        // FIPS 180-2, B.1
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(verify(&mut file, sha256).unwrap());
        assert!(!verify(&mut file, &sha256.replace('b', "c")).unwrap());
        assert!(verify(&mut file, "d41d8cd9").unwrap());
    }
}
