//! A service of gRPC, and its client, without generated code: messages are texts.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use futures_util::Stream;
use pingora_etcd::metrics::LoadReporter;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::transport::{Channel, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::common::local;

const PATH: &str = "/test.Echo/Call";

#[derive(Clone, Copy, Default)]
pub struct Texts;

impl Codec for Texts {
    type Encode = String;
    type Decode = String;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Texts {
    type Item = String;
    type Error = Status;

    fn encode(&mut self, text: String, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(text.as_bytes());
        Ok(())
    }
}

impl Decoder for Texts {
    type Item = String;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<String>, Status> {
        let bytes: Bytes = buffer.copy_to_bytes(buffer.remaining());
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// Answers each message with the server's name and the message. `fail N` ends the call with that
/// status, `wait` never answers.
#[derive(Clone)]
struct Echo {
    name: String,
    /// The status with which every call fails at once.
    fails: Option<i32>,
    calls: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    callers: Callers,
}

/// The other ends of the connections that calls have come on.
type Callers = Arc<Mutex<BTreeSet<SocketAddr>>>;

struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<String, Status>> + Send>>;

impl StreamingService<String> for Echo {
    type Response = String;
    type ResponseStream = Answers;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answers>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<String>>) -> Self::Future {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.callers.lock().unwrap().extend(request.remote_addr());
        let (name, open, always) = (self.name.clone(), Open::new(&self.open), self.fails);
        Box::pin(async move {
            let asked = request.metadata().get("fail");
            let asked = asked.map(|code| code.to_str().unwrap().parse::<i32>().unwrap());
            if let Some(code) = always.or(asked) {
                // The status is in the head of the response.
                return Err(Status::new(code.into(), "as asked"));
            }
            let messages = request.into_inner();
            let state = (messages, name, open);
            let answers =
                futures_util::stream::unfold(state, async |(mut messages, name, open)| {
                    let Ok(Some(text)) = messages.message().await else {
                        return None;
                    };
                    let answer = match text.split_once(' ') {
                        Some(("fail", code)) => {
                            Err(Status::new(code.parse::<i32>().unwrap().into(), "as asked"))
                        }
                        _ if text == "wait" => std::future::pending().await,
                        _ => Ok(format!("{name}: {text}")),
                    };
                    Some((answer, (messages, name, open)))
                });
            Ok(Response::new(Box::pin(answers) as Answers))
        })
    }
}

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

impl tower_service::Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let echo = self.clone();
        Box::pin(async move { Ok(Grpc::new(Texts).streaming(echo, request).await) })
    }
}

/// A running server.
pub struct EchoServer {
    pub address: SocketAddr,
    calls: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    callers: Callers,
    _serving: JoinSet<()>,
}

impl EchoServer {
    pub async fn start(name: &str) -> Self {
        Self::start_with(name, None, None, None).await
    }

    /// With this reporter as a layer.
    pub async fn start_reporting(name: &str, reporter: &LoadReporter) -> Self {
        Self::start_with(name, None, None, Some(reporter)).await
    }

    /// Every call fails with this status.
    pub async fn start_failing(name: &str, status: i32) -> Self {
        Self::start_with(name, Some(status), None, None).await
    }

    /// Over TLS.
    pub async fn start_tls(name: &str, identity: Identity) -> Self {
        Self::start_with(name, None, Some(identity), None).await
    }

    async fn start_with(
        name: &str,
        fails: Option<i32>,
        identity: Option<Identity>,
        reporter: Option<&LoadReporter>,
    ) -> Self {
        let listener = TcpListener::bind((local(), 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (calls, open) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let callers = Callers::default();
        let echo = Echo {
            name: name.to_owned(),
            fails,
            calls: calls.clone(),
            open: open.clone(),
            callers: callers.clone(),
        };
        let mut server = Server::builder();
        if let Some(identity) = identity {
            let tls = ServerTlsConfig::new().identity(identity);
            server = server.tls_config(tls).unwrap();
        }
        let mut serving = JoinSet::new();
        let incoming = TcpListenerStream::new(listener);
        match reporter.map(LoadReporter::layer) {
            Some(layer) => {
                let server = server.layer(layer).add_service(echo);
                serving.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
            }
            None => {
                let server = server.add_service(echo);
                serving.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
            }
        }
        Self {
            address,
            calls,
            open,
            callers,
            _serving: serving,
        }
    }

    /// How many calls there have been.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// How many connections calls have come on.
    pub fn connections(&self) -> usize {
        self.callers.lock().unwrap().len()
    }

    /// How many calls have not ended.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

/// A client over a channel.
pub struct EchoClient(tonic::client::Grpc<Channel>);

impl EchoClient {
    pub fn new(channel: Channel) -> Self {
        Self(tonic::client::Grpc::new(channel))
    }

    pub async fn to(url: &str) -> Self {
        let endpoint = Channel::from_shared(url.to_owned()).unwrap();
        Self::new(endpoint.connect().await.unwrap())
    }

    /// One message, one answer.
    pub async fn call(&mut self, text: &str) -> Result<String, Status> {
        self.send(Request::new(text.to_owned())).await
    }

    pub async fn send(&mut self, request: Request<String>) -> Result<String, Status> {
        self.0.ready().await.map_err(unknown)?;
        let path = PATH.parse().unwrap();
        let answer = self.0.unary(request, path, Texts).await?;
        Ok(answer.into_inner())
    }

    /// One message, with a deadline that the server is told.
    pub async fn call_within(&mut self, text: &str, time: Duration) -> Result<String, Status> {
        let mut request = Request::new(text.to_owned());
        request.set_timeout(time);
        self.send(request).await
    }

    /// The trailers of a call with this message.
    pub async fn trailers_of(&mut self, text: &str) -> http::HeaderMap {
        let messages = tokio_stream::iter([text.to_owned()]);
        let mut answers = self.stream(messages).await.unwrap();
        while answers.message().await.unwrap().is_some() {}
        let trailers = answers.trailers().await.unwrap();
        trailers.unwrap_or_default().into_headers()
    }

    /// Messages in both directions at once.
    pub async fn stream(
        &mut self,
        messages: impl Stream<Item = String> + Send + 'static,
    ) -> Result<Streaming<String>, Status> {
        self.0.ready().await.map_err(unknown)?;
        let path = PATH.parse().unwrap();
        let request = Request::new(messages);
        Ok(self.0.streaming(request, path, Texts).await?.into_inner())
    }
}

fn unknown(error: tonic::transport::Error) -> Status {
    Status::unknown(error.to_string())
}
