//! Warnings of what others on the way can read, or ask for. A process logs them once when it starts, for each place
//! that it talks to without encryption. It also logs one for each database whose server is not verified.
//!
//! Loopback and Unix sockets leave the machine's memory nowhere, so there is no warning for them. There is one for
//! every other place, also where a network is trusted: only its operator can know that.

use http::Uri;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use std::net::IpAddr;

/// Warns when the connection to this database may be without encryption, or its server may be another.
pub fn warn_of_database(options: &PgConnectOptions) {
    let host = options.get_host();
    let what = match options.get_ssl_mode() {
        PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer => {
            "the connection to the database may be in clear: rows can be read on the way"
        }
        PgSslMode::Require => "the server of the database is not verified",
        PgSslMode::VerifyCa | PgSslMode::VerifyFull => return,
    };
    if options.get_socket().is_none() && !is_loopback(host) {
        let (database, sslmode) = (options.get_database().unwrap_or_default(), options.get_ssl_mode());
        tracing::warn!(
            host,
            database,
            ?sslmode,
            "{what}. A server that poses as this one can ask for the role's password itself, and gets it; set sslmode=verify-full \
             in its URL, with sslrootcert where the authority is your own"
        );
    }
}

/// Warns when requests to the place that `variable` names go without encryption. `what` can then be read on the way.
pub fn warn_of_http(variable: &str, url: &str, what: &str) {
    let Ok(uri) = url.parse::<Uri>() else { return };
    let host = uri.host().unwrap_or_default();
    if uri.scheme_str() == Some("http") && !is_loopback(host) {
        tracing::warn!(host, "{variable} is an http:// URL: {what} can be read on the way; set it to an https:// URL");
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::{service::config::database_url, testkit::Log};

    #[test]
    fn a_database_is_told_of_where_it_is_elsewhere_and_its_server_is_not_certain() {
        let said = |place: &str| {
            let log = Log::hear("warn");
            warn_of_database(&database_url(&format!("postgres://me:hunter2@{place}")).unwrap());
            let [clear, unverified] =
                ["the connection to the database may be in clear", "the server of the database is not verified"]
                    .map(|message| log.said(message));
            let lines = [clear.as_slice(), &unverified].concat();
            assert!(lines.iter().all(|line| line.to_string().contains("can ask for the role's password")), "{lines:?}");
            assert!(!format!("{lines:?}").contains("hunter2"));
            (clear.len(), unverified.len())
        };
        for place in ["db/d", "10.0.0.1/d?sslmode=disable", "db/d?sslmode=allow", "db/d?sslmode=prefer", "[fd00::1]/d"]
        {
            assert_eq!(said(place), (1, 0), "{place}");
        }
        assert_eq!(said("db/d?sslmode=require"), (0, 1));
        for place in [
            "db/d?sslmode=verify-ca",
            "db/d?sslmode=verify-full",
            "localhost/d",
            "127.0.0.1:1/d?sslmode=disable",
            "127.9.9.9/d",
            "[::1]/d",
            "localhost/d?host=/run/postgresql",
            "db/d?host=/run/postgresql",
        ] {
            assert_eq!(said(place), (0, 0), "{place}");
        }
    }

    #[test]
    fn requests_in_clear_are_told_of_where_they_leave_the_machine() {
        let said = |url: &str| {
            let log = Log::hear("warn");
            warn_of_http("GATEWAY_URL", url, "payments");
            log.said("GATEWAY_URL is an http:// URL: payments can be read").len()
        };
        assert_eq!(said("http://gateway:8083"), 1);
        assert_eq!(said("http://localhost.example"), 1);
        for url in ["https://gateway:8083", "http://127.0.0.1:8083", "http://localhost", "http://[::1]:1/x"] {
            assert_eq!(said(url), 0, "{url}");
        }
    }
}
