//! Which engines run what is written, and how near they come to the model: for warnings and for model cards.
//!
//! What is said of llama.cpp, `scripts/peers_llama_cpp.py` has run. What is said of others their sources say.

use bitnet_model::config::{Activation, Config, Family};

/// How llama.cpp runs a GGUF file of a model of `config` written as `form`.
///
/// # Errors
/// Why it does not run it.
pub fn llama_cpp(config: &Config, form: &str) -> Result<&'static str, &'static str> {
    let has_sub_norms = config.family != Family::Llama;
    if has_sub_norms && config.hidden_act == Activation::Relu2 {
        return Err(
            "it has no BitNet with relu² (its `bitnet` applies SiLU) and does not know the architecture bitnet-b1.58; \
             run the file with `bitnet`",
        );
    }
    if form == "i2_s" {
        return Err("I2_S is a type of bitnet.cpp; write tq2_0 or tq1_0 for llama.cpp");
    }
    if has_sub_norms && !config.tie_word_embeddings {
        return Err(
            "its `bitnet` has no head of its own beside the embedding; run the file with `bitnet`",
        );
    }
    match form {
        "f16" => Ok("yes, but without the 8-bit activations that the model was trained with"),
        _ => Ok("yes; it rounds activations to 8 bits for every 256 of a row, not for the row"),
    }
}

/// How bitnet.cpp runs it.
///
/// # Errors
/// Why it does not run it.
pub fn bitnet_cpp(config: &Config, form: &str) -> Result<&'static str, &'static str> {
    match (form, config.family, config.hidden_act) {
        ("i2_s", Family::Llama, _) | ("i2_s", _, Activation::Relu2) => {
            Ok("made for it, and not tried with it")
        }
        ("i2_s", ..) => Err("its models with sub-norms have relu²"),
        _ => Err("made for llama.cpp; write i2_s"),
    }
}

/// How transformers runs a folder of this form.
pub fn transformers(config: &Config) -> Result<&'static str, &'static str> {
    match config.family {
        Family::OneBitLlm => {
            Err("the repository of 1bitLLM has code of its own, which is not copied")
        }
        Family::BitNet | Family::Llama => Ok("yes"),
    }
}
