//! Settings that may hold a secret: a token, or a URL with a password in it. Neither `Debug`, nor `--help`, nor an
//! error shows one.

use http::Uri;
use sqlx::postgres::PgConnectOptions;
use std::{convert::Infallible, fmt, str::FromStr};

/// A value as it was given, which may be a secret or hold one.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value itself, for the code that needs it to connect.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The value without blanks around it; `None` when nothing is left.
    #[must_use]
    pub fn given(of: Option<&Self>) -> Option<&str> {
        of.map(|secret| secret.0.trim()).filter(|text| !text.is_empty())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl FromStr for Secret {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// A database's place, and the role that connects to it, for `Debug` of settings. sqlx would print the password.
pub struct DatabasePlace<'a>(pub &'a PgConnectOptions);

impl fmt::Debug for DatabasePlace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(options) = self;
        let mut place = f.debug_struct("Database");
        match options.get_socket() {
            Some(socket) => place.field("socket", socket),
            None => place.field("host", &options.get_host()),
        };
        place
            .field("port", &options.get_port())
            .field("user", &options.get_username())
            .field("database", &options.get_database())
            .field("sslmode", &options.get_ssl_mode())
            .finish_non_exhaustive()
    }
}

/// Reads the URL of a database.
///
/// # Errors
/// What is wrong with the URL. Nothing of it is repeated: sqlx's own words may hold a part of it.
pub fn database_url(url: &str) -> Result<PgConnectOptions, &'static str> {
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err("is not a postgres:// URL");
    }
    match PgConnectOptions::from_str(url) {
        Ok(options) if options.get_database().is_none_or(str::is_empty) => Err("names no database"),
        Ok(options) => Ok(options),
        Err(_) => {
            Err("cannot be read: write special characters of the user and the password as %XX, and the port as a \
                       number; sslmode is disable, allow, prefer, require, verify-ca or verify-full")
        }
    }
}

/// Whether `url` is one of HTTP that names a place and nothing else.
///
/// # Errors
/// What is wrong with the URL. Nothing of it is repeated.
pub fn http_url(url: &str) -> Result<Uri, &'static str> {
    let uri = url.parse::<Uri>().map_err(|_| NO_HTTP_URL)?;
    match uri.authority() {
        Some(authority) if matches!(uri.scheme_str(), Some("http" | "https")) && !authority.host().is_empty() => {
            if authority.as_str().contains('@') {
                return Err("has a user or a password in it");
            }
            if url.contains(['?', '#']) {
                return Err("has a query or a fragment");
            }
            Ok(uri)
        }
        _ => Err(NO_HTTP_URL),
    }
}

const NO_HTTP_URL: &str = "is not a URL that begins with http:// or https:// and names a host";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_shown_by_neither_form_of_debug() {
        let secret = Some(Secret::from("hunter2"));
        assert_eq!(format!("{secret:?}"), "Some((hidden))");
        assert!(!format!("{secret:#?}").contains("hunter2"));
    }

    #[test]
    fn a_databases_place_is_shown_without_its_password_wherever_that_stood() {
        for url in ["postgres://me:hunter2@h:1/d", "postgres://me@h:1/d?password=hunter2"] {
            let options = database_url(url).unwrap();
            assert!(format!("{options:?}").contains("hunter2"), "sqlx hides it itself by now");
            let said = format!("{:?} {:#?}", DatabasePlace(&options), DatabasePlace(&options));
            assert!(!said.contains("hunter2") && said.contains("\"h\"") && said.contains("\"me\""), "{said}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_url_repeats_nothing_of_it() {
        for url in [
            "mysql://root:hunter2@h/d",
            "postgres://root:hunter2@h",
            "postgres://root:x@h:hunter2/d",
            "postgres://root:x@h/d?sslmode=hunter2",
            "postgres://root:x@h/d?hostaddr=hunter2",
            "postgres://root:x@h/d?statement-cache-capacity=hunter2",
            "hunter2",
        ] {
            assert!(!database_url(url).unwrap_err().contains("hunter2"), "{url}");
        }
        for url in
            ["http://u:hunter2@h", "http://hunter2@h", "http://h?key=hunter2", "ftp://hunter2", "hunter2", "http://h#x"]
        {
            assert!(!http_url(url).unwrap_err().contains("hunter2"), "{url}");
        }
        assert!(http_url("https://h:1/base").is_ok());
    }
}
