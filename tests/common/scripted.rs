//! A server that speaks etcd's protocol as a test scripts it, for behaviour that a real etcd does
//! not show, or does not show on demand. The protobuf messages are encoded and decoded by hand, as
//! far as the tests need it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::{Buf, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use pingora_etcd::EtcdOptions;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// The response to a call.
pub enum Answer {
    Message(Message),
    /// A gRPC status code and its message.
    Refused(u8, &'static str),
    /// No response; the connection stays open.
    Nothing,
}

type Script = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

pub struct Scripted {
    address: SocketAddr,
    calls: Arc<Mutex<Vec<String>>>,
    watches: mpsc::UnboundedReceiver<Watches>,
    _serving: JoinSet<()>,
}

/// A watch stream, with the test as the server.
pub struct Watches {
    requests: mpsc::UnboundedReceiver<WatchRequest>,
    responses: mpsc::UnboundedSender<Message>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchRequest {
    Create { key: String, from: u64, id: u64 },
    Cancel(u64),
    Progress,
}

/// A protobuf message under construction.
#[derive(Debug, Clone, Default)]
pub struct Message(Vec<u8>);

impl Message {
    pub fn new() -> Self {
        Self::default()
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// Adds a varint field: a number or a boolean.
    #[must_use]
    pub fn number(mut self, field: u32, value: i64) -> Self {
        self.varint(u64::from(field) << 3);
        self.varint(value as u64);
        self
    }

    #[must_use]
    pub fn bytes(mut self, field: u32, value: impl AsRef<[u8]>) -> Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend_from_slice(value.as_ref());
        self
    }

    #[must_use]
    pub fn message(self, field: u32, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }

    fn framed(&self) -> Bytes {
        let mut framed = vec![0];
        framed.extend_from_slice(&(self.0.len() as u32).to_be_bytes());
        framed.extend_from_slice(&self.0);
        framed.into()
    }
}

/// A response header with this revision, from cluster 1.
pub fn header(revision: i64) -> Message {
    Message::new().number(1, 1).number(2, 1).number(3, revision)
}

/// The status of a member whose cluster has a leader.
pub fn status(version: &str, is_learner: bool) -> Message {
    Message::new()
        .message(1, &header(1))
        .bytes(2, version)
        .number(4, 99)
        .number(10, i64::from(is_learner))
}

/// The response that confirms a new watch.
pub fn created(id: i64, revision: i64) -> Message {
    Message::new()
        .message(1, &header(revision))
        .number(2, id)
        .number(3, 1)
}

/// A progress notification for all watches.
pub fn progress(revision: i64) -> Message {
    Message::new().message(1, &header(revision)).number(2, -1)
}

/// The event of a put.
pub fn put(id: i64, key: &str, revision: i64) -> Message {
    let entry = Message::new()
        .bytes(1, key)
        .number(2, revision)
        .number(3, revision)
        .number(4, 1)
        .bytes(5, "value");
    let event = Message::new().message(2, &entry);
    Message::new()
        .message(1, &header(revision))
        .number(2, id)
        .message(11, &event)
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    while let Some((byte, rest)) = bytes.split_first() {
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// Decodes a message into `(field, number, bytes)`; only one of the last two is set.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let value = varint(&mut bytes);
        let length = if tag & 7 == 2 { value as usize } else { 0 };
        let (content, rest) = bytes.split_at(length);
        fields.push((tag >> 3, value, content.to_vec()));
        bytes = rest;
    }
    fields
}

fn watch_request(bytes: &[u8]) -> WatchRequest {
    let fields_of = |number| {
        let mut outer = fields(bytes).into_iter();
        outer
            .find(|field| field.0 == number)
            .map(|field| fields(&field.2))
    };
    let number = |fields: &[(u64, u64, Vec<u8>)], number| {
        let mut fields = fields.iter();
        fields
            .find(|field| field.0 == number)
            .map_or(0, |field| field.1)
    };
    if let Some(create) = fields_of(1) {
        let key = create.iter().find(|field| field.0 == 1);
        return WatchRequest::Create {
            key: key.map_or_else(String::new, |field| {
                String::from_utf8_lossy(&field.2).into()
            }),
            from: number(&create, 3),
            id: number(&create, 7),
        };
    }
    match fields_of(2) {
        Some(cancel) => WatchRequest::Cancel(number(&cancel, 1)),
        None => WatchRequest::Progress,
    }
}

impl Watches {
    pub async fn next(&mut self) -> WatchRequest {
        super::within("a watch request", self.requests.recv())
            .await
            .unwrap()
    }

    /// Waits for the next request that creates a watch; returns the id of the watch.
    pub async fn next_create(&mut self) -> i64 {
        loop {
            if let WatchRequest::Create { id, .. } = self.next().await {
                return id as i64;
            }
        }
    }

    pub fn try_next(&mut self) -> Option<WatchRequest> {
        self.requests.try_recv().ok()
    }

    pub fn answer(&self, message: Message) {
        let _ = self.responses.send(message);
    }
}

impl Scripted {
    /// Starts a server that responds to each call as the script says, by the call's name. Watch
    /// calls go to [`watches`](Self::watches) instead.
    pub async fn start(script: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        Self::bound(&format!("{}:0", super::local()), script).await
    }

    /// The same, listening on this address.
    pub async fn bound(
        address: &str,
        script: impl Fn(&str) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (opened, watches) = mpsc::unbounded_channel();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (script, recorded): (Script, _) = (Arc::new(script), calls.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                let (script, calls, opened) = (script.clone(), recorded.clone(), opened.clone());
                connections.spawn(serve(connection, script, calls, opened));
            }
        });
        Self {
            address,
            calls,
            watches,
            _serving: serving,
        }
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions::new([self.endpoint()])
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The names of all calls so far, in order.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    /// Waits for the next watch stream.
    pub async fn watches(&mut self) -> Watches {
        super::within("a watch stream", self.watches.recv())
            .await
            .unwrap()
    }
}

async fn serve(
    connection: TcpStream,
    script: Script,
    calls: Arc<Mutex<Vec<String>>>,
    opened: mpsc::UnboundedSender<Watches>,
) {
    let Ok(mut connection) = h2::server::handshake(connection).await else {
        return;
    };
    let mut answering = JoinSet::new();
    while let Some(Ok((request, respond))) = connection.accept().await {
        let call = request
            .uri()
            .path()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        calls.lock().unwrap().push(call.clone());
        let (script, opened) = (script.clone(), opened.clone());
        answering.spawn(async move {
            if call == "Watch" {
                watch(request, respond, opened).await;
            } else {
                answer(respond, script(&call)).await;
            }
        });
    }
}

fn response(trailers: Option<(u8, &str)>) -> Response<()> {
    let mut response = Response::builder().header("content-type", "application/grpc");
    if let Some((code, message)) = trailers {
        response = response
            .header("grpc-status", u16::from(code))
            .header("grpc-message", message);
    }
    response.body(()).unwrap()
}

async fn answer(mut respond: SendResponse<Bytes>, answer: Answer) {
    match answer {
        Answer::Nothing => std::future::pending().await,
        Answer::Refused(code, message) => {
            let _ = respond.send_response(response(Some((code, message))), true);
        }
        Answer::Message(message) => {
            let Ok(mut stream) = respond.send_response(response(None), false) else {
                return;
            };
            let _ = stream.send_data(message.framed(), false);
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", 0.into());
            let _ = stream.send_trailers(trailers);
        }
    }
}

async fn watch(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    opened: mpsc::UnboundedSender<Watches>,
) {
    let Ok(stream) = respond.send_response(response(None), false) else {
        return;
    };
    let (asked, requests) = mpsc::unbounded_channel();
    let (responses, to_send) = mpsc::unbounded_channel();
    let _ = opened.send(Watches {
        requests,
        responses,
    });
    tokio::join!(
        read_requests(request.into_body(), asked),
        write_responses(stream, to_send)
    );
}

async fn read_requests(mut body: RecvStream, asked: mpsc::UnboundedSender<WatchRequest>) {
    let mut buffer = BytesMut::new();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        buffer.extend_from_slice(&data);
        while buffer.len() >= 5 {
            let length = u32::from_be_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]) as usize;
            if buffer.len() < 5 + length {
                break;
            }
            buffer.advance(5);
            let _ = asked.send(watch_request(&buffer.split_to(length)));
        }
    }
}

async fn write_responses(
    mut stream: SendStream<Bytes>,
    mut to_send: mpsc::UnboundedReceiver<Message>,
) {
    while let Some(message) = to_send.recv().await {
        if stream.send_data(message.framed(), false).is_err() {
            return;
        }
    }
}
