//! Short names of what is too long to be logged or compared by eye.

use sha2::{Digest, Sha256};

/// The first 64 bits of the SHA-256 of `bytes`, in hexadecimal.
pub fn fingerprint(bytes: impl AsRef<[u8]>) -> String {
    hex(&Sha256::digest(bytes)[..8])
}

/// Two digits a byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_the_beginning_of_the_hash() {
        // The first example of FIPS 180-2.
        assert_eq!(fingerprint("abc"), "ba7816bf8f01cfea");
        assert_eq!(hex(&[0, 10, 255]), "000aff");
    }
}
