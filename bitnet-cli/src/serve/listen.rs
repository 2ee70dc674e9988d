//! Connections: accepting, TLS, time limits, and the end.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context, bail};
use axum::{Router, body::Body};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};
use tower::ServiceExt;

use super::{app::App, guard::Peer};

/// How long clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the headers of a request, and between requests.
    pub headers: Duration,
    /// For taking what is sent to them.
    pub write: Duration,
}

/// After an error of accepting, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);
/// A request's headers are no longer than these.
const HEADER_BYTES: usize = 64 << 10;
const HEADERS: usize = 64;

/// Where connections come in.
pub struct Listener {
    tcp: TcpListener,
    tls: Option<TlsAcceptor>,
    timeouts: Timeouts,
    connections: Arc<Semaphore>,
}

impl Listener {
    /// Listens. At most `connections` are open at once.
    ///
    /// # Errors
    /// An address that is taken or not ours.
    pub async fn bind(
        address: SocketAddr,
        tls: Option<TlsAcceptor>,
        timeouts: Timeouts,
        connections: usize,
    ) -> anyhow::Result<Self> {
        let tcp = TcpListener::bind(address).await;
        let tcp = tcp.with_context(|| format!("{address} cannot be listened at"))?;
        let connections = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
        Ok(Self { tcp, tls, timeouts, connections })
    }

    /// Where it listens.
    pub fn url(&self) -> io::Result<String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}", self.tcp.local_addr()?))
    }

    /// Answers connections until `stop`; then waits until those that are being answered are done, or for `grace`.
    pub async fn serve(
        self,
        app: Arc<App>,
        router: Router,
        stop: oneshot::Receiver<()>,
        grace: Duration,
    ) {
        let graceful = GracefulShutdown::new();
        let mut stop = stop;
        loop {
            let permit = tokio::select! {
                _ = &mut stop => break,
                permit = self.connections.clone().acquire_owned() => permit,
            };
            let Ok(permit) = permit else { break };
            let (stream, peer) = tokio::select! {
                _ = &mut stop => break,
                accepted = self.tcp.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!("a connection cannot be accepted: {error}");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                },
            };
            let connection = Connection {
                peer,
                router: router.clone(),
                timeouts: self.timeouts,
                watcher: graceful.watcher(),
                _permit: permit,
            };
            tokio::spawn(connection.open(stream, self.tls.clone()));
        }
        drop(self.tcp);
        app.drains.store(true, Ordering::Release);
        if let Some(loaded) = app.loaded.get() {
            loaded.engine.drain();
        }
        if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
            tracing::warn!("some requests took longer than the {} s of grace", grace.as_secs());
        }
    }
}

struct Connection {
    peer: SocketAddr,
    router: Router,
    timeouts: Timeouts,
    watcher: Watcher,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    async fn open(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        // Tokens go out one by one: none is to wait for the next.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.timeouts.write));
        let stream = Box::pin(stream);
        match tls {
            None => self.answer(stream).await,
            Some(tls) => {
                match tokio::time::timeout(self.timeouts.headers, tls.accept(stream)).await {
                    Ok(Ok(stream)) => self.answer(stream).await,
                    Ok(Err(error)) => tracing::debug!("no TLS: {error}"),
                    Err(_) => tracing::debug!("no TLS in time"),
                }
            }
        }
    }

    async fn answer(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Self { peer, router, timeouts, watcher, _permit } = self;
        let service = service_fn(move |request: Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(Peer(peer.ip()));
            router.clone().oneshot(request)
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(timeouts.headers);
        http.max_buf_size(HEADER_BYTES).max_headers(HEADERS);
        let connection = http.serve_connection(TokioIo::new(stream), service);
        if let Err(error) = watcher.watch(connection).await {
            tracing::debug!("a connection ended: {error}");
        }
    }
}

/// TLS with a certificate chain and its key, both PEM.
///
/// # Errors
/// Files that cannot be read or don't belong together.
pub fn tls(certificate: &Path, key: &Path) -> anyhow::Result<TlsAcceptor> {
    let name = certificate.display();
    let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain: Vec<_> = chain.with_context(|| format!("{name}: is no PEM file of certificates"))?;
    if chain.is_empty() {
        bail!("{name}: has no certificate");
    }
    let private = PrivateKeyDer::from_pem_file(key);
    let private = private.with_context(|| format!("{}: is no PEM file of a key", key.display()))?;
    let config = ServerConfig::builder_with_provider(ring::default_provider().into());
    let config = config.with_safe_default_protocol_versions()?.with_no_client_auth();
    let mut config = config
        .with_single_cert(chain, private)
        .with_context(|| format!("{name} and {} don't fit", key.display()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
