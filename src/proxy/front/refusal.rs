//! The responses to clients whose request the proxy never sees.

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Its head did not arrive in time.
    Timeout,
    /// Its head is too large.
    HeadTooLarge,
}

impl Refusal {
    pub(super) fn status(self) -> u16 {
        match self {
            Self::Timeout => 408,
            Self::HeadTooLarge => 431,
        }
    }

    /// The whole response.
    pub(super) fn response(self) -> &'static [u8] {
        match self {
            Self::Timeout => {
                b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\
                  Content-Type: text/plain; charset=utf-8\r\nContent-Length: 35\r\n\r\n\
                  the request did not arrive in time\n"
            }
            Self::HeadTooLarge => {
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\
                  Content-Type: text/plain; charset=utf-8\r\nContent-Length: 37\r\n\r\n\
                  the head of the request is too large\n"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_response_has_the_length_that_it_says() {
        for refusal in [Refusal::Timeout, Refusal::HeadTooLarge] {
            let text = std::str::from_utf8(refusal.response()).unwrap();
            assert!(text.starts_with(&format!("HTTP/1.1 {} ", refusal.status())));
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            let length = format!("Content-Length: {}", body.len());
            assert!(head.lines().any(|line| line == length), "{head}");
        }
    }
}
