//! What every request passes on its way in and every response on its way out: an id, the door, the book.

use std::{
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bitnet_model::fingerprint::hex;
use hyper::body::{Frame, SizeHint};
use sha2::{Digest, Sha256};

use super::{
    app::App,
    error::{ApiError, Blocked, Result},
    watch::Record,
};
use crate::openai::unique;

/// The id of a request, from the client or ours.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Where keys are looked for besides `Authorization: Bearer`.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// The longest id of a client.
const MOST_ID_CHARS: usize = 128;
/// What may be asked without a key.
const OPEN: [&str; 3] = ["/", "/health", "/ready"];

/// Whence a connection comes.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// Who asks.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Stands for the key, or for the address where there are no keys.
    pub client: String,
    /// Whether it may change what is served.
    pub is_admin: bool,
}

/// Lets a request in or not, and writes down what becomes of it.
pub async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    // A path that is no route of ours would be a label without end.
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("other", MatchedPath::as_str).to_owned();
    let method = request.method().as_str().to_owned();
    let record = Record::new(id, (method, route.clone()), app.watch.clone(), app.audit.clone());
    let address = request.extensions().get::<Peer>().map(|peer| peer.0);
    record.note(|details| details.client = hashed(app.salt, address));
    let mut response = match admit(&app, &request, &route, address, &record) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            request.extensions_mut().insert(record.clone());
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    record.note(|details| {
        details.status = response.status().as_u16();
        let blocked = response.extensions().get::<Blocked>();
        details.blocked = details.blocked.or(blocked.map(|blocked| blocked.0));
    });
    secure(&app, response.headers_mut());
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.map(|body| Body::new(Recorded { body, _record: record }))
}

/// The body of a response: the request is over when it is.
struct Recorded {
    body: Body,
    _record: Arc<Record>,
}

impl HttpBody for Recorded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn admit(
    app: &App,
    request: &Request,
    route: &str,
    address: Option<IpAddr>,
    record: &Record,
) -> Result<Caller> {
    let address = address.map_or_else(String::new, |address| address.to_string());
    if app.policy.loopback_hosts_only && !is_loopback_host(request.headers()) {
        let message = "without keys the server answers to `localhost`, 127.0.0.1 and [::1] only";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message).blocked("host"));
    }
    let open = |client| Caller { client, is_admin: false };
    if OPEN.contains(&route) {
        return Ok(open(address));
    }
    // What is only looked at, such as `/stats` by the page, costs next to nothing.
    let is_work = request.method() == Method::POST;
    let too_many = |exceeded| ApiError::rate(exceeded, "requests");
    if is_work {
        app.rates.address(&address).map_err(too_many)?;
    }
    let caller = match &app.policy.keys {
        None => open(address),
        Some(keys) => {
            let holder = key(request.headers()).and_then(|key| keys.holder(key));
            let Some(holder) = holder else {
                let wrong = app.rates.wrong_key(&address);
                wrong.map_err(|exceeded| ApiError::rate(exceeded, "wrong keys"))?;
                let message = "a valid API key is needed, as `Authorization: Bearer KEY`";
                let error = ApiError::new(StatusCode::UNAUTHORIZED, message);
                return Err(error.code("invalid_api_key").blocked("key"));
            };
            record.note(|details| details.key = Some(holder.name.clone()));
            Caller { client: holder.name, is_admin: holder.is_admin }
        }
    };
    if is_work {
        app.rates.request(&caller.client).map_err(too_many)?;
    }
    Ok(caller)
}

fn key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    bearer.or_else(|| headers.get(API_KEY)?.to_str().ok())
}

fn is_loopback_host(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let is_loopback = name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || name.eq_ignore_ascii_case("localhost")
}

/// The client's id of a request if it is fit for logs and headers, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let is_fit = |id: &&str| {
        (1..=MOST_ID_CHARS).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    given.filter(is_fit).map_or_else(unique, String::from)
}

/// An address as logs have it: the same for one client, and nothing that leads back to it.
fn hashed(salt: u128, address: Option<IpAddr>) -> String {
    let address = address.map_or_else(String::new, |address| address.to_string());
    let hash = Sha256::new().chain_update(salt.to_le_bytes()).chain_update(address).finalize();
    hex(&hash[..6])
}

/// Headers that tell browsers to trust nothing they need not. The page has a policy of its own.
fn secure(app: &App, headers: &mut HeaderMap) {
    let always = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    for (name, value) in always {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let policy = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(policy);
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if app.policy.tls {
        let value = HeaderValue::from_static("max-age=31536000");
        headers.insert(header::STRICT_TRANSPORT_SECURITY, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_a_loopback_host() {
        let is = |host: &'static str| {
            is_loopback_host(&HeaderMap::from_iter([(
                header::HOST,
                HeaderValue::from_static(host),
            )]))
        };
        assert!(is("localhost") && is("LocalHost:80") && is("127.0.0.1:8080") && is("127.1.2.3"));
        assert!(is("[::1]:8080") && is("[::1]"));
        assert!(
            !is("evil.example") && !is("127.0.0.1.evil.example") && !is("10.0.0.1:80") && !is("")
        );
        assert!(!is_loopback_host(&HeaderMap::new()));
        let host = |host| (header::HOST, HeaderValue::from_static(host));
        let two = [host("localhost"), host("evil.example")];
        assert!(!is_loopback_host(&HeaderMap::from_iter(two)), "which one is meant?");
    }
}
