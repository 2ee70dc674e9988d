//! `/v1/responses`: texts only, nothing kept.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    answering::{self, Answering},
    error::{ApiError, Result},
    generate::{Events, Source, events},
    received::Received,
};
use crate::openai::{Route, now, responses, unique};

/// `POST /v1/responses`
pub async fn respond(Received { context, body }: Received) -> Result<Response> {
    let chat = responses::to_chat(&body)?;
    let response = responses::Response::new(&body, (&unique(), now()));
    drop(body); // it may be large
    let asked = answering::read(&context, Route::Chat, chat).await;
    // Fields have other names here.
    let asked = asked.map_err(|error| {
        error.renamed(&[
            ("messages", "input"),
            ("response_format", "text.format"),
            ("max_completion_tokens", "max_output_tokens"),
        ])
    })?;
    let mut answering = Answering::start(context, asked).await?;
    if answering.asked.stream.is_some() {
        let chunks = Box::new(Sent { response, number: 0, text: 0 });
        return Ok(events(Source { answering, chunks }));
    }
    while answering.next().await?.is_some() {}
    Ok(Json(response.to_json(&answering.asked, &answering.choices)).into_response())
}

/// What of a response has been sent.
struct Sent {
    response: responses::Response,
    /// Of the next event.
    number: u64,
    /// Bytes.
    text: usize,
}

impl Sent {
    fn event(&mut self, kind: &str, fields: Value) -> String {
        let mut event = json!({"type": kind, "sequence_number": self.number});
        self.number += 1;
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
        format!("event: {kind}\ndata: {event}\n\n")
    }

    /// Where a part of the text is.
    fn place(&self, more: Value) -> Value {
        let mut place =
            json!({"item_id": self.response.item_id(), "output_index": 0, "content_index": 0});
        if let (Some(place), Value::Object(more)) = (place.as_object_mut(), more) {
            place.extend(more);
        }
        place
    }
}

impl Events for Sent {
    fn begin(&mut self, answering: &Answering) -> anyhow::Result<String> {
        let response = self.response.to_json(&answering.asked, &[]);
        let item = self.response.item("in_progress", &[]);
        let part = self.place(json!({"part": self.response.part("")}));
        Ok([
            self.event("response.created", json!({"response": response})),
            self.event("response.in_progress", json!({"response": response})),
            self.event("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.event("response.content_part.added", part),
        ]
        .concat())
    }

    fn news(&mut self, answering: &Answering, choice: usize) -> anyhow::Result<String> {
        let text = answering.choices[choice].text();
        let piece = text.get(self.text..).unwrap_or_default();
        if piece.is_empty() {
            return Ok(String::new());
        }
        self.text += piece.len();
        let delta = self.place(json!({"delta": piece, "logprobs": []}));
        Ok(self.event("response.output_text.delta", delta))
    }

    fn end(&mut self, answering: &Answering) -> anyhow::Result<String> {
        let Answering { asked, choices, .. } = answering;
        let response = self.response.to_json(asked, choices);
        let text = choices.first().map_or("", |choice| choice.text());
        let part = self.response.part(text);
        let done = self.place(json!({"text": text, "logprobs": []}));
        let part_done = self.place(json!({"part": part}));
        let kind = match response["status"].as_str() {
            Some("incomplete") => "response.incomplete",
            Some("failed") => "response.failed",
            _ => "response.completed",
        };
        let item = response["output"][0].clone();
        Ok([
            self.event("response.output_text.done", done),
            self.event("response.content_part.done", part_done),
            self.event("response.output_item.done", json!({"output_index": 0, "item": item})),
            self.event(kind, json!({"response": response})),
        ]
        .concat())
    }

    fn failed(&mut self, error: &ApiError) -> String {
        let error = &error.to_json()["error"];
        let fields =
            json!({"code": error["code"], "message": error["message"], "param": error["param"]});
        self.event("error", fields)
    }
}
