#!/usr/bin/env bash
# Builds the tests of the kernels, the model and the fixtures for 64-bit ARM Linux and runs them in an emulator: once as a
# processor that has every instruction, once as one without dot products, which falls back to the portable kernel.
#
#   scripts/aarch64.sh [ARGUMENT...]      # arguments go to the test binaries, for example a filter: kernels
#
# Needs Linux on x86-64, root (for debootstrap, mount and chroot) and debootstrap. The compiler for the target, its standard
# library and the emulator come from Debian unstable, in a folder of 3 GB that the first run makes
# (BITNET_AARCH64_ROOT, default ~/.cache/bitnet-aarch64/debian). It can be interrupted and started again at any point.
# The first build compiles every dependency, which takes long.
set -euo pipefail
cd "$(dirname "$0")/.."

root=${BITNET_AARCH64_ROOT:-$HOME/.cache/bitnet-aarch64/debian}
target=aarch64-unknown-linux-gnu
packages=(cargo rustc gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross libstd-rust-dev:arm64 qemu-user)
tests=(-p bitnet-model -p bitnet-tests --lib --test parity --test model)
# Must end within seconds that an emulator does not keep to; asks the system what is in memory, which the emulator answers with 0.
left_out=(--skip hostile_templates_end_with_an_error --skip large_pages_are_those_of_the_mapping)

die() { printf '%s: %s\n' "${0##*/}" "$1" >&2 && exit 1; }

[[ $(uname -sm) == "Linux x86_64" ]] || die "runs on Linux on x86-64 only"
((EUID == 0)) || die "needs root: debootstrap, mount and chroot do"

make_root() {
    [[ ! -e $root/.complete ]] || return 0
    command -v debootstrap >/dev/null || die "needs debootstrap (apt-get install debootstrap)"
    if [[ ! -d $root ]]; then
        mkdir -p "$(dirname "$root")"
        rm -rf --one-file-system "$root.part" # of an interrupted run
        debootstrap --variant=minbase --include=ca-certificates sid "$root.part" http://deb.debian.org/debian
        mv "$root.part" "$root"
    fi
    chroot "$root" dpkg --add-architecture arm64
    chroot "$root" apt-get update
    chroot "$root" dpkg --configure -a # of an interrupted run
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y --no-install-recommends "${packages[@]}"
    touch "$root/.complete"
}

inside() { # inside COMMAND...: runs it in the folder, with this repository as /src; the mounts end with the command
    local home=${CARGO_HOME:-$HOME/.cargo}
    mkdir -p "$root/src" "$root/cargo/registry"
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --mount --propagation private bash -euc '
        root=$1 repository=$2 registry=$3
        shift 3
        mount --bind "$repository" "$root/src"
        mount --bind "$registry" "$root/cargo/registry"
        mount --rbind /dev "$root/dev"
        mount --rbind /proc "$root/proc"
        exec chroot "$root" env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 "$@"
    ' inside "$root" "$PWD" "$home/registry" "$@"
}

cargo_test() { # cargo_test CPU ARGUMENT...: as that processor
    local cpu=$1
    shift
    inside CARGO_HOME=/cargo CARGO_TARGET_DIR=/src/target/aarch64 RUST_BACKTRACE=1 \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $cpu" \
        cargo test --manifest-path /src/Cargo.toml --target "$target" --locked --offline "${tests[@]}" "$@"
}

make_root
cargo fetch --locked --target "$target" --target x86_64-unknown-linux-gnu
cargo_test max --no-run

log=$(mktemp)
trap 'rm -f "$log"' EXIT
summary=() failed=0
for cpu in max cortex-a72; do
    printf '\n== as %s\n' "$cpu"
    cargo_test "$cpu" --no-fail-fast -- "${left_out[@]}" "$@" 2>&1 | tee "$log" || failed=1
    while read -r line; do
        summary+=("$cpu: $line")
    done < <(awk '/^ +Running / { sub(/^ +Running /, ""); name = $0 } /^test result: / { sub(/^test result: /, ""); print name ": " $0 }' "$log")
done
printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
