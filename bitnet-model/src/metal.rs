//! Metal, Apple's devices: no op runs there so far, and each says so.
//!
//! What it would take is written in docs/metal.md.

use candle_core::Error;

/// What an op says on a Metal device.
pub fn not_on_metal(op: &str) -> Error {
    Error::Msg(format!(
        "{op}: not implemented on Metal: put the model and its input on the processor, Device::Cpu \
         (docs/metal.md says what is missing)"
    ))
}

/// `metal_fwd` of a custom op of 1, 2 or 3 arguments, or of one that works in place on the first of 2: the error of
/// `metal::not_on_metal`.
#[macro_export]
macro_rules! no_metal_fwd {
    (1) => {
        $crate::no_metal_fwd!((::candle_core::MetalStorage, ::candle_core::Shape): &);
    };
    (2) => {
        $crate::no_metal_fwd!((::candle_core::MetalStorage, ::candle_core::Shape): &, &);
    };
    (3) => {
        $crate::no_metal_fwd!((::candle_core::MetalStorage, ::candle_core::Shape): &, &, &);
    };
    (in place 2) => {
        $crate::no_metal_fwd!((): &mut, &);
    };
    ($result:ty: $(& $($mutable:ident)?),+) => {
        fn metal_fwd(
            &self,
            $(_: & $($mutable)? ::candle_core::MetalStorage, _: &::candle_core::Layout),+
        ) -> ::candle_core::Result<$result> {
            Err($crate::metal::not_on_metal(self.name()))
        }
    };
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use candle_core::{CpuStorage, CustomOp1, InplaceOp2, Layout, MetalStorage, Result, Shape};

    struct Nothing;
    struct InPlace;

    impl CustomOp1 for Nothing {
        fn name(&self) -> &'static str {
            "nothing"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), layout.shape().clone()))
        }

        crate::no_metal_fwd!(1);
    }

    impl InplaceOp2 for InPlace {
        fn name(&self) -> &'static str {
            "nothing in place"
        }

        fn cpu_fwd(
            &self,
            _: &mut CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
        ) -> Result<()> {
            Ok(())
        }

        crate::no_metal_fwd!(in place 2);
    }

    #[test]
    fn an_op_says_that_it_is_not_there_and_what_to_do() {
        let (mut there, layout) = (MetalStorage, Layout::contiguous(1));
        let new = CustomOp1::metal_fwd(&Nothing, &there, &layout).map(|_| ());
        let in_place = InplaceOp2::metal_fwd(&InPlace, &mut there, &layout, &MetalStorage, &layout);
        for (result, name) in [(new, "nothing"), (in_place, "nothing in place")] {
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: not implemented on Metal")), "{error}");
            assert!(error.contains("Device::Cpu"), "{error}");
        }
    }

    /// Files below `folder` in which an op does not say so.
    fn silent(folder: &Path, files: &mut Vec<String>) -> usize {
        let mut ops = 0;
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                ops += silent(&path, files);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let count = |is: fn(&str) -> bool| text.lines().filter(|line| is(line.trim())).count();
            let here = count(|line| {
                line.starts_with("impl")
                    && (line.contains("CustomOp") || line.contains("InplaceOp"))
            });
            let says = |line: &str| {
                ["crate::no_metal_fwd!(", "bitnet_model::no_metal_fwd!("]
                    .iter()
                    .any(|start| line.starts_with(start))
            };
            if here != count(says) {
                files.push(path.display().to_string());
            }
            ops += here;
        }
        ops
    }

    #[test]
    fn every_op_of_the_workspace_says_so() {
        let mut files = Vec::new();
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let ops = ["bitnet-model/src", "bitnet-train/src"]
            .map(|folder| silent(&crates.join(folder), &mut files));
        assert!(
            ops.iter().all(|&ops| ops > 5),
            "{ops:?}: the ops are not where they are looked for"
        );
        assert!(files.is_empty(), "without no_metal_fwd!: {files:?}");
    }
}
