//! A tower layer for servers: it counts requests and adds load reports to responses.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderName, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::reporter::{LoadReporter, RequestGuard};
use crate::load_report::LOAD_REPORT_HEADER;

/// A [`tower`](https://docs.rs/tower) layer for a server (feature `tower`): counts each request as
/// in flight from its arrival until the last byte of its response is produced, and adds a load
/// report to the response. A report that the service itself has added is kept.
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
        LoadReportFuture {
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
        let request = this.request.take();
        Poll::Ready(result.map(|mut response| {
            let headers = response.headers_mut();
            if !headers.contains_key(HEADER) {
                headers.insert(HEADER, this.reporter.header_value());
            }
            response.map(|inner| CountedBody { inner, request })
        }))
    }
}

pin_project! {
    /// A response body that counts its request as in flight until its end.
    #[derive(Debug)]
    pub struct CountedBody<B> {
        #[pin]
        inner: B,
        request: Option<RequestGuard>,
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
        let frame = ready!(this.inner.poll_frame(context));
        if frame.is_none() {
            *this.request = None;
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
}
