//! Errors of Pingora, without what backends have sent.

use ::pingora::{Error, ImmutStr};

/// The most bytes of what an error says.
const MOST: usize = 300;

/// Shortens what an error and its causes say to 300 bytes each. Pingora puts the whole head of a response into it that it
/// cannot read, a megabyte or more, with cookies and whatever came after it. For the hook
/// [`error_while_proxy`](::pingora::proxy::ProxyHttp::error_while_proxy), before the error is logged.
pub fn shorten_error(error: &mut Error) {
    if let Some(context) = error.context.as_ref().map(ImmutStr::as_str)
        && context.len() > MOST
    {
        let end = context.floor_char_boundary(MOST);
        let short = format!("{}...", &context[..end]);
        error.set_context(short);
    }
    let cause = error.cause.as_mut();
    if let Some(cause) = cause.and_then(|cause| cause.downcast_mut::<Box<Error>>()) {
        shorten_error(cause);
    }
}

#[cfg(test)]
mod tests {
    use ::pingora::ErrorType;

    use super::*;

    #[test]
    fn nothing_that_is_long_is_left_in_an_error() {
        let long = "\u{e4}".repeat(1_000_000);
        for depth in 0..3 {
            let mut error = Error::explain(ErrorType::InvalidHTTPHeader, long.clone());
            for _ in 0..depth {
                error = error.more_context("and so on");
            }
            shorten_error(&mut error);
            let said = error.to_string();
            assert!((300..400).contains(&said.len()), "{}", said.len());
            assert!(said.contains("..."), "{said}");
        }
        let mut short = Error::explain(ErrorType::ReadError, "short");
        shorten_error(&mut short);
        assert!(short.to_string().ends_with("short"));
    }
}
