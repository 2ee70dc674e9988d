//! Tensor names: llama.cpp's, and the Hub's for the same thing.

/// Outside of the blocks.
const OUTER: [(&str, &str); 3] = [
    (EMBEDDING, "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    (HEAD, "lm_head.weight"),
];

/// The embedding.
pub(super) const EMBEDDING: &str = "token_embd.weight";

/// The head.
pub(super) const HEAD: &str = "output.weight";

/// In a block: `blk.N.` and this, `model.layers.N.` and that.
const NORMS: [(&str, &str); 4] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
];
const PROJECTIONS: [(&str, &str); 7] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// What a tensor is in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A norm, the embedding or the head, under this name.
    Float(String),
    /// The weight of a projection, under this name.
    Projection(String),
    /// One number that multiplies a projection's output.
    Factor,
}

/// The name in the file of the Hub's tensor `hub`; `None` for what has none.
pub(super) fn in_file(hub: &str) -> Option<String> {
    if let Some((ours, _)) = OUTER.iter().find(|(_, name)| *name == hub) {
        return Some((*ours).into());
    }
    let (layer, rest) = hub.strip_prefix("model.layers.")?.split_once('.')?;
    let part = rest.strip_suffix(".weight")?;
    // 1bitLLM's names for the sub-norms.
    let part = match part {
        "self_attn.inner_attn_ln" => "self_attn.attn_sub_norm",
        "mlp.ffn_layernorm" => "mlp.ffn_sub_norm",
        part => part,
    };
    let (ours, _) = NORMS.iter().chain(&PROJECTIONS).find(|(_, name)| *name == part)?;
    Some(format!("blk.{layer}.{ours}.weight"))
}

/// What the tensor `name` is; `None` for what no supported model has.
pub(super) fn meaning(name: &str) -> Option<Meaning> {
    if let Some((_, hub)) = OUTER.iter().find(|(ours, _)| *ours == name) {
        return Some(Meaning::Float((*hub).into()));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    if layer.parse::<u32>().ok()?.to_string() != layer {
        return None;
    }
    let (part, suffix) = rest.split_once('.')?;
    let hub = |table: &[(&str, &str)]| {
        let (_, hub) = table.iter().find(|(ours, _)| *ours == part)?;
        Some(format!("model.layers.{layer}.{hub}.weight"))
    };
    match suffix {
        "weight" => {
            hub(&NORMS).map(Meaning::Float).or_else(|| hub(&PROJECTIONS).map(Meaning::Projection))
        }
        "scale" => hub(&PROJECTIONS).map(|_| Meaning::Factor),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_what_is_none() {
        let norm = "model.layers.12.self_attn.attn_sub_norm.weight";
        assert_eq!(meaning("blk.12.attn_sub_norm.weight"), Some(Meaning::Float(norm.into())));
        let down = "model.layers.0.mlp.down_proj.weight";
        assert_eq!(meaning("blk.0.ffn_down.weight"), Some(Meaning::Projection(down.into())));
        assert_eq!(in_file(norm).unwrap(), "blk.12.attn_sub_norm.weight");
        assert_eq!(in_file(down).unwrap(), "blk.0.ffn_down.weight");
        assert_eq!(meaning("blk.0.ffn_down.scale"), Some(Meaning::Factor));
        assert_eq!(meaning("output.weight"), Some(Meaning::Float("lm_head.weight".into())));
        for name in [
            "",
            "blk.",
            "blk.0",
            "blk.00.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk.0.attn_q.bias",
            "blk.0.attn_norm.scale",
            "rope_freqs.weight",
            "blk.0.ffn_gate_exps.weight",
        ] {
            assert_eq!(meaning(name), None, "{name}");
        }
    }
}
