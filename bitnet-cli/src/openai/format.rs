//! `response_format`: the form that answers are to have.

use bitnet_model::grammar::{Grammar, GrammarFactory};
use serde_json::{Value, json};

use super::{
    Refusal,
    fields::{Fields, wrong},
};

const NAME: &str = "response_format";

/// The schema of JSON that is asked for; `None` if any text is.
///
/// # Errors
/// Other types, and schemas that are none.
pub fn schema(fields: Fields<'_>) -> Result<Option<Value>, Refusal> {
    let Some(format) = fields.any(NAME) else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            schema @ Value::Object(_) => Ok(Some(schema.clone())),
            other => {
                let wrong = wrong("response_format.json_schema.schema", other, "an object");
                Err(Refusal::of(NAME, wrong.message))
            }
        },
        _ => {
            let reason = format!(
                "`{NAME}` must be an object with the type `text`, `json_object` or `json_schema`"
            );
            Err(Refusal::of(NAME, reason))
        }
    }
}

/// The grammar of a schema.
///
/// # Errors
/// A schema that cannot be kept to.
pub fn grammar(schema: &Value, grammars: &GrammarFactory) -> Result<Grammar, Refusal> {
    grammars.json_schema(schema).map_err(|error| Refusal::of(NAME, format!("`{NAME}`: {error}")))
}
