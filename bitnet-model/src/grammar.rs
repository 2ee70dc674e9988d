//! Texts of a given form, such as JSON under a schema: which tokens may come next.
//!
//! A [`Matcher`] walks along with a text and excludes the tokens after which it could no longer become one of the form. The
//! work is that of the crate `llguidance`: a lexer of regular expressions by derivatives and an Earley parser, run over the
//! trie of the vocabulary. Schemas come from strangers, so what they can cost is bounded.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use llguidance::{
    Matcher as Parser, ParserFactory,
    api::{GrammarWithLexer, ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use crate::{Error, Result, isolated::isolated, text::Tokenizer};

/// White space between the parts of a JSON text: a model that would go on with it for ever comes to an end.
const WHITE_SPACE: &str = r"\x20|\n[\x20\t]{0,16}";

/// States of a lexer, 1 to 2 KB each: the most memory of a grammar. Schemas of hundreds of properties take some thousands.
const MAX_LEXER_STATES: usize = 30_000;

/// Symbols of a grammar. The largest public schema (FHIR) has as many.
const MAX_SYMBOLS: usize = 200_000;

/// Schemas that nest deeper are refused, as JSON that does is by its reader.
const MAX_DEPTH: usize = 128;

/// Longer tokens are never allowed: the trie cannot hold them.
const MAX_TOKEN_BYTES: usize = 1000;

/// Of the reason why a grammar is refused, which can quote it.
const MAX_REASON_CHARS: usize = 500;

/// Makes grammars over the vocabulary of a tokenizer. Clones share the vocabulary's trie, which the first grammar builds.
#[derive(Clone)]
pub struct GrammarFactory(Arc<Vocabulary>);

struct Vocabulary {
    tokenizer: Tokenizer,
    size: usize,
    parsers: OnceLock<Result<ParserFactory, String>>,
}

impl GrammarFactory {
    /// For a model whose logits are `vocab_size`. Ids without a token in the tokenizer are never allowed.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Self {
        let (tokenizer, parsers) = (tokenizer.clone(), OnceLock::new());
        Self(Arc::new(Vocabulary { tokenizer, size: vocab_size, parsers }))
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn json_object(&self) -> Result<Grammar> {
        self.json_schema(&json!({"type": "object"}))
    }

    /// The JSON texts under a schema.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar> {
        self.compile("start: @json", [("json".to_owned(), schema)])
    }

    /// The texts of a grammar in llguidance's variant of Lark, which refers to JSON schemas as `@name`.
    ///
    /// # Errors
    /// What is no grammar or schema, has keywords that cannot be kept to, or would take too much work; a tokenizer whose
    /// tokens are no pieces of a text.
    pub fn compile<'a>(
        &self,
        lark: &str,
        schemas: impl IntoIterator<Item = (String, &'a Value)>,
    ) -> Result<Grammar> {
        let mut grammars = vec![GrammarWithLexer::from_lark(lark.to_owned())];
        for (name, schema) in schemas {
            let Value::Object(fields) = schema else {
                return Err(Error::Input("a JSON schema must be an object".into()));
            };
            if is_deeper(schema, MAX_DEPTH) {
                return Err(refused(&format!("it nests more than {MAX_DEPTH} deep")));
            }
            let mut schema = fields.clone();
            // The compiler's options, which are ours to choose and not the schema's.
            schema.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE}));
            let mut grammar = GrammarWithLexer::from_json_schema(schema.into());
            grammar.name = Some(name);
            grammars.push(grammar);
        }
        let vocabulary = self.0.clone();
        let compile = move || {
            let parsers = vocabulary.parsers.get_or_init(|| vocabulary.parsers());
            let parsers = parsers.as_ref().map_err(|reason| Error::Tokenizer(reason.clone()))?;
            let parser = parsers.create_parser(TopLevelGrammar { grammars, max_tokens: None });
            let parser = parser.map_err(|error| refused(&format!("{error:#}")))?;
            let mut parser = Parser::new(Ok(parser));
            // Some find only here that they have no text or take too much work.
            parser.compute_mask().map_err(|error| refused(&error.to_string()))?;
            Ok(Grammar { parser, end: vocabulary.size })
        };
        isolated("grammar", compile).map_err(|reason| refused(&reason))?
    }
}

impl Vocabulary {
    fn parsers(&self) -> Result<ParserFactory, String> {
        let words = self.tokenizer.token_bytes(self.size).map_err(|error| error.to_string())?;
        let mut words =
            Vec::from_iter(words.into_iter().map(|bytes| {
                bytes.filter(|bytes| bytes.len() <= MAX_TOKEN_BYTES).unwrap_or_default()
            }));
        // One more token stands for the end, whichever tokens end a text. Texts have no byte 0xff, which marks what is special.
        words.push(b"\xff<end>".to_vec());
        let info = TokRxInfo::new(words.len() as u32, self.size as u32);
        let trie = TokTrie::from(&info, &words);
        let capabilities = InferenceCapabilities::default();
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let tokens = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&(tokens as _), capabilities, &slices)
            .map_err(|error| error.to_string())?;
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            max_grammar_size: MAX_SYMBOLS,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        factory.quiet();
        Ok(factory)
    }
}

/// Whether lists and objects nest deeper than `depth`.
fn is_deeper(value: &Value, depth: usize) -> bool {
    let item_is_deeper = |item| is_deeper(item, depth - 1);
    match value {
        Value::Array(items) => depth == 0 || items.iter().any(item_is_deeper),
        Value::Object(fields) => depth == 0 || fields.values().any(item_is_deeper),
        _ => false,
    }
}

fn refused(reason: &str) -> Error {
    let reason = reason.trim_end_matches("<non-verbose/>").trim_end();
    let reason = if reason.starts_with("NoExtension") { "no text has this form" } else { reason };
    let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
    Error::Input(format!("the form cannot be kept to: {reason}"))
}

/// The form that texts are to have.
#[derive(Clone)]
pub struct Grammar {
    /// At the beginning of a text.
    parser: Parser,
    /// The id that stands for the end.
    end: usize,
}

impl Grammar {
    /// At the beginning of a text.
    pub fn matcher(&self) -> Matcher {
        Matcher(self.clone())
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

/// A text that keeps to a [`Grammar`], as far as it has come.
#[derive(Clone, Debug)]
pub struct Matcher(Grammar);

impl Matcher {
    /// Lowers the logits (vocabulary) of tokens that may not come next to −∞: of those in `ends`, which end the text, unless
    /// it may end here, and of all others that do not go on with it.
    ///
    /// # Errors
    /// If no token of the vocabulary can go on with it, or it takes more work than allowed.
    pub fn allow(&mut self, logits: &mut [f32], ends: &[u32]) -> Result<()> {
        let Grammar { parser, end } = &mut self.0;
        let allowed = parser.compute_mask_or_eos().map_err(|error| refused(&error.to_string()))?;
        let may_end = allowed.get(*end);
        for (id, logit) in logits.iter_mut().enumerate() {
            let is_end = ends.iter().any(|&end| end as usize == id);
            if !(if is_end { may_end } else { id < *end && allowed.get(id) }) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the next token, which is none of those that end the text.
    ///
    /// # Errors
    /// A token that is not allowed.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        self.0.parser.consume_token(token).map_err(|error| refused(&error.to_string()))
    }

    /// Whether the text is complete and nothing can follow.
    pub fn is_finished(&self) -> bool {
        self.0.parser.is_stopped()
    }
}
