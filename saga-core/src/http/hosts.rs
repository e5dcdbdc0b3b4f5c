//! Requests that a page of another site makes in a person's browser are refused before a handler sees them.
//!
//! A listener without a token trusts its network, and a browser carries a page of another site into that network. Three
//! checks keep such a page out:
//!
//! | what the page tries | what refuses it | answer |
//! |---|---|---|
//! | its own name resolves to this address (DNS rebinding) | `Host` is a name that this listener is reached by | 421 |
//! | it sends a request from its own origin | `Origin`, when there is one, is the request's own host, or listed | 421 |
//! | it has an image, a script or a stream loaded from here, which sends no origin | `Sec-Fetch-Site`, when there is one, is not another site | 421 |
//! | it posts a form, or anything else that needs no preflight | a POST's `Origin` is the request's own host and port, or it has a header or a type that a form cannot send | 415 |
//!
//! A person may follow a link from anywhere to here. An IP address and `localhost` are always good names: no other site
//! has them. Off loopback, so is a name without a dot (`order-svc`): public names have one. Every other name is listed
//! in `HTTP_HOSTS`, for the admin listener in `ADMIN_HOSTS`. `*` there stands for every host, and for no origin. A
//! listed name is an origin under every scheme and port, where another server may have pages. So it may send requests
//! and no forms. No CORS header is ever sent, so a page of a listed origin can send requests, and the browser shows it
//! no answer.
//!
//! The checks follow the OWASP sheets on cross-site request forgery ("custom request headers", "verifying origin").
//! They also follow the Fetch standard's list of types that need no preflight, and W3C's Fetch Metadata.

use super::problem::Problem;
use crate::clock;
use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, Method, StatusCode, Version, header, uri::Authority};
use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The names that a listener is reached by, beside those that are always good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosts {
    any: bool,
    names: Arc<[String]>,
}

impl Hosts {
    /// Reads a list with commas; `*` stands for every host, and for no origin. The error is the index of the first
    /// entry that is no name.
    ///
    /// # Errors
    /// The index of the first entry that is no name.
    pub fn parse(list: &str) -> Result<Self, usize> {
        let entries: Vec<_> =
            list.split(',').map(|name| name.trim().trim_end_matches('.').to_ascii_lowercase()).collect();
        let is_name = |name: &String| {
            name == "*" || (!name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)))
        };
        match entries.iter().position(|name| !is_name(name)) {
            Some(wrong) => Err(wrong),
            None => Ok(Self { any: entries.iter().any(|name| name == "*"), names: entries.into() }),
        }
    }

    fn lists(&self, name: &str) -> bool {
        self.names.iter().any(|listed| listed == name)
    }
}

/// The requests that a listener takes for its own.
#[derive(Debug, Clone)]
pub(super) struct Listener {
    hosts: Hosts,
    /// Whether only this machine reaches it.
    loopback: bool,
    /// When a refusal was last logged.
    logged: Arc<Mutex<Option<Instant>>>,
}

/// How often a refused host or origin is logged: a client that asks under a wrong name asks again and again.
const LOGGED_EVERY: Duration = Duration::from_secs(60);

impl Listener {
    pub(super) fn new(hosts: Hosts, loopback: bool) -> Self {
        Self { hosts, loopback, logged: Arc::default() }
    }

    fn log(&self, request: &Request) {
        let (now, mut logged) = (clock::monotonic(), self.logged.lock().unwrap_or_else(PoisonError::into_inner));
        if logged.is_some_and(|last| now.saturating_duration_since(last) < LOGGED_EVERY) {
            return;
        }
        *logged = Some(now);
        drop(logged);
        let header = |name: HeaderName| request.headers().get(name).map(|value| shorten(&format!("{value:?}")));
        tracing::warn!(
            host = header(header::HOST),
            origin = header(header::ORIGIN),
            "a request was refused: it names this listener otherwise than HTTP_HOSTS and ADMIN_HOSTS, or comes from a page of another site"
        );
    }

    fn is_reached_as(&self, name: &str) -> bool {
        let own = is_address(name) || name == "localhost" || name.ends_with(".localhost");
        own || (!self.loopback && !name.contains('.')) || self.hosts.any || self.hosts.lists(name)
    }

    /// The problem for which a request is refused; `None`: it is let through.
    fn refuses(&self, request: &Request) -> Option<Problem> {
        let host = match host(request) {
            Ok(host) => host,
            Err(problem) => return Some(problem),
        };
        if let Some((name, _)) = &host
            && !self.is_reached_as(name)
        {
            return Some(refused("host", foreign_host(name)));
        }
        let mut origins = request.headers().get_all(header::ORIGIN).iter().peekable();
        let has_origin = origins.peek().is_some();
        let mut own_page = has_origin;
        for origin in origins {
            let origin = origin.to_str().ok().and_then(origin_of);
            let own = origin.as_ref().is_some_and(|origin| Some(origin) == host.as_ref());
            own_page &= own;
            if !own && !origin.is_some_and(|(name, _)| self.hosts.lists(&name)) {
                return Some(refused("origin", foreign_origin()));
            }
        }
        if !has_origin && is_of_another_site(request) {
            return Some(refused("origin", foreign_origin()));
        }
        let form = *request.method() == Method::POST && !own_page && is_what_a_form_sends(request.headers());
        form.then(|| refused("form", like_a_form()))
    }
}

pub(super) async fn own_requests(State(listener): State<Listener>, request: Request, next: Next) -> Response {
    match listener.refuses(&request) {
        Some(problem) => {
            if problem.status() == StatusCode::MISDIRECTED_REQUEST {
                listener.log(&request);
            }
            problem.into_response()
        }
        None => next.run(request).await,
    }
}

/// Counts a request that was turned away at the door.
fn refused(reason: &'static str, problem: Problem) -> Problem {
    super::admission::count_refused(reason);
    problem
}

/// A host's name, and its port unless it is the scheme's own.
type Named = (String, Option<u16>);

/// The host that a request names; `None` for an HTTP/1.0 client that names none, which no browser is.
fn host(request: &Request) -> Result<Option<Named>, Problem> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    let said = match (request.uri().authority(), first) {
        // RFC 9112, section 3.2.2: a request's target in absolute form counts more than its Host.
        (Some(authority), _) => Some(authority.as_str()),
        (None, Some(host)) => Some(host.to_str().unwrap_or_default()),
        (None, None) if request.version() < Version::HTTP_11 => None,
        (None, None) => return Err(Problem::malformed("The request has no Host header.")),
    };
    if second.is_some() {
        return Err(Problem::malformed("The request has more than one Host header."));
    }
    said.map(|said| named(said).ok_or_else(|| Problem::malformed("The request's Host is no host."))).transpose()
}

fn named(host: &str) -> Option<Named> {
    let authority: Authority = host.parse().ok()?;
    let name = authority.host().trim_end_matches('.').to_ascii_lowercase();
    let port = authority.port_u16().filter(|port| !matches!(port, 80 | 443));
    (!name.is_empty() && !host.contains('@')).then_some((name, port))
}

fn origin_of(origin: &str) -> Option<Named> {
    named(origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"))?)
}

fn is_address(name: &str) -> bool {
    let bare = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name);
    bare.parse::<IpAddr>().is_ok()
}

/// Whether a page of another site has a browser load this. A link that a person follows is not meant.
fn is_of_another_site(request: &Request) -> bool {
    let says = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap_or_default());
    let follows = matches!(*request.method(), Method::GET | Method::HEAD) && says("sec-fetch-mode") == Some("navigate");
    says("sec-fetch-site").is_some_and(|site| !matches!(site, "same-origin" | "none")) && !follows
}

/// The types that a page can have a browser send to anywhere, without asking first.
const FORM_TYPES: [&str; 3] = ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"];
/// The headers that no form sends: before a browser sends one of these to another site, it asks that site. (So it does
/// before a bearer token, and not before the credentials that it keeps itself.)
const NO_FORM_SENDS: [&str; 3] = ["idempotency-key", "if-match", "x-requested-with"];

fn is_what_a_form_sends(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or_default());
    let kind = kind.map(|kind| kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
    let simple = kind.is_none_or(|kind| kind.is_empty() || FORM_TYPES.contains(&kind.as_str()));
    let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.split_once(' '));
    let shows_a_token = token.is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    simple && !shows_a_token && !NO_FORM_SENDS.iter().any(|name| headers.contains_key(*name))
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

fn foreign_host(name: &str) -> Problem {
    let name = shorten(name);
    Problem::new(StatusCode::MISDIRECTED_REQUEST, "misdirected", "This listener is not known under that name").detail(format!(
        "The request's Host is {name:?}. Use an IP address or localhost, or list the name in HTTP_HOSTS (the admin listener's: ADMIN_HOSTS)."
    ))
}

fn foreign_origin() -> Problem {
    Problem::new(StatusCode::MISDIRECTED_REQUEST, "foreign-origin", "A page of another site sent this").detail(
        "The request's Origin, or its Sec-Fetch-Site, is not this listener's. List the page's host in HTTP_HOSTS (the admin listener's: \
         ADMIN_HOSTS) if it may send requests.",
    )
}

fn like_a_form() -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content-type", "A form of any page could have sent this").detail(
        "Send `content-type: application/json`, or one of the headers Idempotency-Key, If-Match, Authorization, X-Requested-With.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn listener(loopback: bool, hosts: &str) -> Listener {
        Listener::new(Hosts::parse(hosts).unwrap_or_default(), loopback)
    }

    fn answer(listener: &Listener, method: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri("/v1/things");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        listener.refuses(&request.body(Body::empty()).unwrap()).map_or(200, |problem| problem.status().as_u16())
    }

    #[test]
    fn a_name_that_another_site_could_have_is_not_this_listeners_unless_listed() {
        let (near, far, listed) =
            (listener(true, ""), listener(false, ""), listener(true, "api.example, Shop.Example"));
        for (host, on_loopback, off_loopback, when_listed) in [
            ("127.0.0.1:8080", 200, 200, 200),
            ("[::1]:8080", 200, 200, 200),
            ("10.1.2.3", 200, 200, 200),
            ("LOCALHOST:8080", 200, 200, 200),
            ("localhost.", 200, 200, 200),
            ("orders.localhost", 200, 200, 200),
            ("order-svc:8080", 421, 200, 421),
            ("evil.example", 421, 421, 421),
            ("127.0.0.1.evil.example", 421, 421, 421),
            ("localhost.evil.example", 421, 421, 421),
            ("api.example:8443", 421, 421, 200),
            ("shop.example", 421, 421, 200),
            ("user@localhost", 400, 400, 400),
            ("a b", 400, 400, 400),
            ("", 400, 400, 400),
        ] {
            let get = |listener| answer(listener, "GET", &[("host", host)]);
            assert_eq!((get(&near), get(&far), get(&listed)), (on_loopback, off_loopback, when_listed), "{host:?}");
        }
        assert_eq!(answer(&near, "GET", &[]), 400, "HTTP/1.1 names its host");
        assert_eq!(answer(&near, "GET", &[("host", "localhost"), ("host", "localhost")]), 400);
        let any = listener(true, "*");
        assert_eq!(answer(&any, "GET", &[("host", "shop.example")]), 200);
        let foreign = [("host", "shop.example"), ("origin", "http://evil.example")];
        assert_eq!(answer(&any, "GET", &foreign), 421, "every host, and no origin");
    }

    #[test]
    fn a_request_of_another_origin_is_refused_and_one_of_its_own_is_not() {
        let listener = listener(true, "shop.example");
        for (origin, status) in [
            ("http://localhost:8080", 200),
            ("http://LOCALHOST:8080", 200),
            ("https://shop.example", 200),
            ("http://localhost:3000", 421),
            ("http://localhost", 421),
            ("http://evil.example", 421),
            ("http://evil.example/shop.example", 421),
            ("null", 421),
            ("", 421),
            ("file://", 421),
        ] {
            let headers = [("host", "localhost:8080"), ("origin", origin)];
            assert_eq!(answer(&listener, "GET", &headers), status, "{origin:?}");
        }
        assert_eq!(answer(&listener, "GET", &[("host", "localhost"), ("origin", "http://localhost:80")]), 200);
    }

    #[test]
    fn what_a_page_of_another_site_loads_is_refused_and_a_link_to_here_is_not() {
        let listener = listener(true, "");
        for (site, mode, method, status) in [
            ("cross-site", "no-cors", "GET", 421),
            ("same-site", "no-cors", "GET", 421),
            ("cross-site", "navigate", "POST", 421),
            ("cross-site", "navigate", "GET", 200),
            ("same-origin", "cors", "GET", 200),
            ("none", "navigate", "GET", 200),
        ] {
            let headers =
                [("host", "localhost"), ("sec-fetch-site", site), ("sec-fetch-mode", mode), ("if-match", "*")];
            assert_eq!(answer(&listener, method, &headers), status, "{site} {mode} {method}");
        }
    }

    #[test]
    fn a_post_that_a_form_could_send_is_refused() {
        let listener = listener(true, "");
        for (header, status) in [
            (None, 415),
            (Some(("content-type", "application/x-www-form-urlencoded")), 415),
            (Some(("content-type", "Text/Plain; charset=utf-8")), 415),
            (Some(("content-type", "multipart/form-data; boundary=x")), 415),
            (Some(("content-type", "")), 415),
            (Some(("content-type", "application/json")), 200),
            (Some(("idempotency-key", "k-1")), 200),
            (Some(("if-match", "*")), 200),
            (Some(("authorization", "Bearer x")), 200),
            (Some(("authorization", "Basic x")), 415),
            (Some(("origin", "http://localhost")), 200),
            (Some(("x-requested-with", "curl")), 200),
        ] {
            let headers: Vec<_> = [("host", "localhost")].into_iter().chain(header).collect();
            assert_eq!(answer(&listener, "POST", &headers), status, "{header:?}");
            assert_eq!(answer(&listener, "GET", &headers), 200, "{header:?}");
        }
    }

    #[test]
    fn a_page_of_a_listed_name_sends_requests_and_only_a_page_of_our_own_sends_forms() {
        let listener = listener(false, "shop.example");
        let (json, text) = (Some(("content-type", "application/json")), Some(("content-type", "text/plain")));
        for (origin, header, status) in [
            ("http://shop.example:8000", text, 415),
            ("http://shop.example:8000", None, 415),
            ("http://shop.example:8000", json, 200),
            ("http://shop.example:8000", Some(("idempotency-key", "k-1")), 200),
            ("https://shop.example", text, 200),
            ("https://shop.example", None, 200),
        ] {
            let headers: Vec<_> = [("host", "shop.example"), ("origin", origin)].into_iter().chain(header).collect();
            assert_eq!(answer(&listener, "POST", &headers), status, "{origin} {header:?}");
        }
        let both =
            [("host", "shop.example"), ("origin", "https://shop.example"), ("origin", "http://shop.example:8000")];
        assert_eq!(answer(&listener, "POST", &both), 415);
    }

    #[test]
    fn a_list_of_hosts_has_only_names_in_it() {
        for (wrong, which) in
            [("", 0), ("a,,b", 1), ("http://a.example", 0), ("a, a.example:80", 1), ("a b", 0), ("*.example", 0)]
        {
            assert_eq!(Hosts::parse(wrong), Err(which), "{wrong:?}");
        }
        let listed = Hosts::parse("A.example., *").unwrap();
        assert!(listed.any && listed.lists("a.example"));
    }
}
