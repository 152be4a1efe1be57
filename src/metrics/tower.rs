//! A tower layer for servers: it counts requests and adds load reports to responses.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::reporter::{LoadReporter, RequestGuard};
use crate::load_report::{
    LOAD_REPORT_BINARY_HEADER, LOAD_REPORT_FORMAT_HEADER, LOAD_REPORT_HEADER, LoadReportForm,
};

/// The field that carries the status of a gRPC call.
const GRPC_STATUS: &str = "grpc-status";

/// A [`tower`](https://docs.rs/tower) layer for a server (feature `tower`): counts each request as
/// in flight from its arrival until the last byte of its response is produced, and adds a load
/// report to the response: as text, or in the form that the request asks for in
/// [`LOAD_REPORT_FORMAT_HEADER`]. A report that the service itself has added is kept. That of a gRPC call
/// is in the trailers, as [`LOAD_REPORT_BINARY_HEADER`], where gRPC's own balancers read it.
///
/// A 5xx response, or a gRPC status by which a server says that it failed, counts as a failure.
///
/// ```
/// use axum::{Router, routing::get};
/// use pingora_etcd::metrics::LoadReporter;
///
/// let reporter = LoadReporter::new(); // or node.load_reporter()
/// let app: Router = Router::new()
///     .route("/", get(|| async { "hello" }))
///     .layer(reporter.layer());
/// ```
#[derive(Debug, Clone)]
pub struct LoadReportLayer {
    reporter: LoadReporter,
}

impl LoadReporter {
    /// A layer that adds a report to every response of a service (feature `tower`).
    pub fn layer(&self) -> LoadReportLayer {
        self.counts_requests();
        LoadReportLayer {
            reporter: self.clone(),
        }
    }
}

impl<S> Layer<S> for LoadReportLayer {
    type Service = LoadReportService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        LoadReportService {
            inner,
            reporter: self.reporter.clone(),
        }
    }
}

/// A service inside a [`LoadReportLayer`].
#[derive(Debug, Clone)]
pub struct LoadReportService<S> {
    inner: S,
    reporter: LoadReporter,
}

impl<S, Q, B> Service<Request<Q>> for LoadReportService<S>
where
    S: Service<Request<Q>, Response = Response<B>>,
{
    type Response = Response<CountedBody<B>>;
    type Error = S::Error;
    type Future = LoadReportFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let asked = request.headers().get(LOAD_REPORT_FORMAT_HEADER);
        let asked = asked.and_then(|form| form.to_str().ok());
        LoadReportFuture {
            form: asked.and_then(LoadReportForm::from_name),
            request: Some(self.reporter.enter()),
            reporter: self.reporter.clone(),
            inner: self.inner.call(request),
        }
    }
}

pin_project! {
    /// The future response of a [`LoadReportService`].
    #[derive(Debug)]
    pub struct LoadReportFuture<F> {
        #[pin]
        inner: F,
        reporter: LoadReporter,
        form: Option<LoadReportForm>,
        request: Option<RequestGuard>,
    }
}

impl<F, B, E> Future for LoadReportFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<CountedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        const HEADER: HeaderName = HeaderName::from_static(LOAD_REPORT_HEADER);
        let this = self.project();
        let result = ready!(this.inner.poll(context));
        let mut request = this.request.take();
        let mut response = match result {
            Ok(response) => response,
            Err(error) => {
                fail(&mut request);
                return Poll::Ready(Err(error));
            }
        };
        let is_error = response.status().is_server_error();
        let headers = response.headers_mut();
        if is_error || has_failed(headers) {
            fail(&mut request);
        }
        let in_trailers = is_grpc(headers) && !headers.contains_key(GRPC_STATUS);
        if !in_trailers && !headers.contains_key(HEADER) {
            let form = this.form.unwrap_or_default();
            headers.insert(HEADER, this.reporter.header_value_as(form));
        }
        let reporter = in_trailers.then(|| this.reporter.clone());
        Poll::Ready(Ok(response.map(|inner| CountedBody {
            inner,
            request,
            reporter,
        })))
    }
}

fn fail(request: &mut Option<RequestGuard>) {
    if let Some(request) = request {
        request.fail();
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    // The trailers of gRPC-Web are in its body.
    let is_grpc = |kind: &[u8]| {
        let rest = kind.strip_prefix(b"application/grpc");
        rest.is_some_and(|rest| !rest.starts_with(b"-web"))
    };
    kind.is_some_and(is_grpc)
}

/// Whether a gRPC status is there that blames the server: UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED,
/// INTERNAL, UNAVAILABLE, DATA_LOSS.
fn has_failed(headers: &HeaderMap) -> bool {
    let status = headers.get(GRPC_STATUS).map(HeaderValue::as_bytes);
    status.is_some_and(|status| [&b"2"[..], b"4", b"8", b"13", b"14", b"15"].contains(&status))
}

pin_project! {
    /// A response body that counts its request as in flight until its end.
    #[derive(Debug)]
    pub struct CountedBody<B> {
        #[pin]
        inner: B,
        request: Option<RequestGuard>,
        // For the trailers.
        reporter: Option<LoadReporter>,
    }
}

impl<B: Body> Body for CountedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let mut frame = ready!(this.inner.poll_frame(context));
        match &mut frame {
            None => *this.request = None,
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    if has_failed(trailers) {
                        fail(this.request);
                    }
                    if let Some(reporter) = this.reporter
                        && !trailers.contains_key(LOAD_REPORT_BINARY_HEADER)
                    {
                        let report = reporter.report().to_binary_header();
                        // Base64 is always a valid header value.
                        if let Ok(report) = HeaderValue::try_from(report) {
                            trailers.insert(LOAD_REPORT_BINARY_HEADER, report);
                        }
                    }
                }
            }
            Some(Err(_)) => fail(this.request),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::task::Waker;

    use super::*;
    use crate::load_report::LoadReport;

    struct Hello;

    impl Service<Request<()>> for Hello {
        type Response = Response<String>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Response<String>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<()>) -> Self::Future {
            let mut response = Response::new("hello".to_owned());
            if let Some(own) = request.headers().get("own") {
                response
                    .headers_mut()
                    .insert(LOAD_REPORT_HEADER, own.clone());
            }
            std::future::ready(Ok(response))
        }
    }

    #[tokio::test]
    async fn a_request_counts_until_its_response_is_produced() {
        let reporter = LoadReporter::new();
        let mut service = reporter.layer().layer(Hello);
        let response = service.call(Request::new(())).await.unwrap();
        let report = LoadReport::parse(&response.headers()[LOAD_REPORT_HEADER]).unwrap();
        assert_eq!(report.in_flight, Some(1.0));
        assert_eq!(reporter.in_flight(), 1, "the body is still to come");

        let mut body = std::pin::pin!(response.into_body());
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(
            body.as_mut().poll_frame(&mut context),
            Poll::Ready(Some(Ok(_)))
        ));
        assert!(matches!(
            body.as_mut().poll_frame(&mut context),
            Poll::Ready(None)
        ));
        assert_eq!(reporter.in_flight(), 0);
    }

    #[tokio::test]
    async fn a_dropped_request_no_longer_counts_and_an_own_report_is_kept() {
        let reporter = LoadReporter::new();
        let mut service = reporter.layer().layer(Hello);
        let waiting = service.call(Request::new(()));
        assert_eq!(reporter.in_flight(), 1);
        drop(waiting);
        assert_eq!(reporter.in_flight(), 0);

        let request = Request::builder()
            .header("own", "TEXT eps=1")
            .body(())
            .unwrap();
        let response = service.call(request).await.unwrap();
        assert_eq!(response.headers()[LOAD_REPORT_HEADER], "TEXT eps=1");
        drop(response);
        assert_eq!(reporter.in_flight(), 0);
    }

    #[tokio::test]
    async fn the_form_that_is_asked_for_is_given() {
        let mut service = LoadReporter::new().layer().layer(Hello);
        for (asked, prefix) in [("json", "JSON {"), ("BIN", "BIN "), ("xml", "TEXT ")] {
            let request = Request::builder().header(LOAD_REPORT_FORMAT_HEADER, asked);
            let response = service.call(request.body(()).unwrap()).await.unwrap();
            let value = response.headers()[LOAD_REPORT_HEADER].to_str().unwrap();
            assert!(value.starts_with(prefix), "{asked}: {value}");
            assert_eq!(LoadReport::parse(value).unwrap().in_flight, Some(1.0));
        }
    }

    /// A gRPC call as a body: a message, then trailers.
    struct Call(u8);

    impl Body for Call {
        type Data = std::io::Cursor<&'static [u8]>;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Infallible>>> {
            self.0 += 1;
            let mut trailers = HeaderMap::new();
            trailers.insert(GRPC_STATUS, HeaderValue::from_static("14"));
            Poll::Ready(match self.0 {
                1 => Some(Ok(Frame::data(std::io::Cursor::new(b"data")))),
                2 => Some(Ok(Frame::trailers(trailers))),
                _ => None,
            })
        }
    }

    #[test]
    fn a_call_of_grpc_has_the_report_in_its_trailers() {
        let reporter = LoadReporter::new();
        let mut body = std::pin::pin!(CountedBody {
            inner: Call(0),
            request: Some(reporter.enter()),
            reporter: Some(reporter.clone()),
        });
        let mut context = Context::from_waker(Waker::noop());
        let mut frames = Vec::new();
        while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut context) {
            frames.push(frame);
        }
        let trailers = frames.pop().unwrap().into_trailers().unwrap();
        let names = crate::metrics::MetricNames::default();
        let report = LoadReport::from_headers(&trailers, &names)
            .unwrap()
            .unwrap();
        assert_eq!(report.in_flight, Some(1.0));
        assert_eq!(reporter.in_flight(), 0);
        let eps = loop {
            if let Some(eps) = reporter.report().eps {
                break eps;
            }
            std::thread::yield_now();
        };
        assert!(eps > 0.0, "the call failed");
    }
}
