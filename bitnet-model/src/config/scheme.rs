//! The keys of `quantization_config` that tell a [`Scheme`] other than b1.58's:
//!
//! - `weight_quantizer`: `"absmean"`, `"sign"` or `"none"`;
//! - `activation_bits`: 8, 4, or 32 for activations that stay as they are;
//! - `o_proj_activation_bits`, `down_proj_activation_bits`: of that projection, if they differ;
//! - `hadamard`: those of `"o_proj"` and `"down_proj"` whose input is rotated.
//!
//! There is no published configuration for these models. Absent keys mean b1.58.

use serde_json::{Value, json};

use super::fields::Fields;
use crate::{
    error::Result,
    quant::{InputKind, InputWidth, Scheme, WeightKind},
};

const WEIGHTS: &str = "weight_quantizer";
const BITS: &str = "activation_bits";
const HADAMARD: &str = "hadamard";

pub(super) fn parse(fields: &Fields) -> Result<Scheme> {
    let weights = match fields.string(WEIGHTS)? {
        None | Some("absmean") => WeightKind::Absmean,
        Some("sign") => WeightKind::Sign,
        Some("none") => WeightKind::Full,
        Some(_) => {
            return Err(fields.unsupported(WEIGHTS, "\"absmean\", \"sign\", \"none\""));
        }
    };
    let rotated = fields.strings(HADAMARD)?;
    if rotated.iter().any(|name| !matches!(*name, "o_proj" | "down_proj")) {
        return Err(fields.unsupported(HADAMARD, "\"o_proj\", \"down_proj\""));
    }
    let default = bits(fields, BITS)?.unwrap_or_default();
    let input = |name: &str| -> Result<InputKind> {
        let width = bits(fields, &format!("{name}_{BITS}"))?.unwrap_or(default);
        let hadamard = rotated.contains(&name);
        if hadamard && width == InputWidth::Full {
            let reason = format!("rotates the input of {name}, which is not quantized");
            return Err(fields.error(HADAMARD, reason));
        }
        Ok(InputKind { width, hadamard })
    };
    let stream = InputKind { width: default, hadamard: false };
    Ok(Scheme { weights, stream, o_proj: input("o_proj")?, down_proj: input("down_proj")? })
}

fn bits(fields: &Fields, name: &str) -> Result<Option<InputWidth>> {
    Ok(match fields.integer(name)? {
        None => None,
        Some(8) => Some(InputWidth::Int8),
        Some(4) => Some(InputWidth::Int4),
        Some(32) => Some(InputWidth::Full),
        Some(_) => return Err(fields.unsupported(name, "8, 4, 32")),
    })
}

/// Adds the keys of what is not b1.58's.
pub(super) fn write(scheme: Scheme, json: &mut Value) {
    let bits = |width| match width {
        InputWidth::Int8 => 8,
        InputWidth::Int4 => 4,
        InputWidth::Full => 32,
    };
    match scheme.weights {
        WeightKind::Absmean => {}
        WeightKind::Sign => json[WEIGHTS] = json!("sign"),
        WeightKind::Full => json[WEIGHTS] = json!("none"),
    }
    if scheme.stream.width != InputWidth::default() {
        json[BITS] = json!(bits(scheme.stream.width));
    }
    let inputs = [("o_proj", scheme.o_proj), ("down_proj", scheme.down_proj)];
    for (name, input) in inputs {
        if input.width != scheme.stream.width {
            json[format!("{name}_{BITS}")] = json!(bits(input.width));
        }
    }
    let rotated: Vec<_> =
        inputs.iter().filter(|(_, input)| input.hadamard).map(|(name, _)| name).collect();
    if !rotated.is_empty() {
        json[HADAMARD] = json!(rotated);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::fields::parse_object;

    fn read(json: &Value) -> Result<Scheme> {
        let path = Path::new("config.json");
        let object = parse_object(path, &json.to_string()).unwrap();
        parse(&Fields::new(path, &object))
    }

    #[test]
    fn what_is_written_is_read_back_and_the_default_is_silent() {
        let mut json = json!({});
        write(Scheme::default(), &mut json);
        assert_eq!(json, json!({}));
        for weights in [WeightKind::Absmean, WeightKind::Sign, WeightKind::Full] {
            for stream in [InputWidth::Int8, InputWidth::Int4, InputWidth::Full] {
                for o_proj in [InputWidth::Int8, InputWidth::Int4] {
                    for hadamard in [false, true] {
                        let plain = |width| InputKind { width, hadamard: false };
                        let scheme = Scheme {
                            weights,
                            stream: plain(stream),
                            o_proj: InputKind { width: o_proj, hadamard },
                            down_proj: plain(stream),
                        };
                        let mut json = json!({});
                        write(scheme, &mut json);
                        assert_eq!(read(&json).unwrap(), scheme, "{json}");
                    }
                }
            }
        }
    }

    #[test]
    fn unknown_values_are_refused_by_name() {
        for (json, key) in [
            (json!({"weight_quantizer": "median"}), "weight_quantizer"),
            (json!({"activation_bits": 2}), "activation_bits"),
            (json!({"down_proj_activation_bits": 16}), "down_proj_activation_bits"),
            (json!({"hadamard": ["q_proj"]}), "hadamard"),
            (json!({"hadamard": ["o_proj"], "activation_bits": 32}), "hadamard"),
        ] {
            let message = read(&json).unwrap_err().to_string();
            assert!(message.contains(key), "{json}: {message}");
        }
    }
}
