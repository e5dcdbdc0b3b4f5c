//! `Json`, `Query` and `Path` whose rejections are problems that name the field.
//!
//! | what is wrong | answer |
//! |---|---|
//! | not JSON, cut off, not UTF-8 | 400 `malformed` |
//! | another content type | 415 `content-type` |
//! | too large | 413 `too-large` |
//! | unknown, missing, ill-typed or out of range field | 422 `validation` with its path |
//! | an array in the place of an object, at any level | 422 `validation` with its path |
//! | a NUL character anywhere (PostgreSQL has no room for it in text) | 422 `validation` with its path |
//! | a query or path parameter | 400 `malformed` with its name |

use super::{problem::Problem, words::for_people};
use crate::{json::Named, reason::without_places};
use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request, path::ErrorKind, rejection::PathRejection},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, header, request::Parts};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// A JSON body. `T` should say `#[serde(deny_unknown_fields)]`: a misspelt optional field must not be ignored.
#[derive(Debug, Clone, Copy, Default)]
pub struct Json<T>(pub T);

/// The query string, decoded; its fields are named in a rejection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query<T>(pub T);

/// The path's parameters, decoded; they are named in a rejection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Path<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content-type", "The body has to be JSON")
                .detail("Send it with `content-type: application/json`."));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| body_problem(rejection.status()))?;
        parse(&bytes).map(Self)
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        refuse_nul(parts.uri.query().unwrap_or_default(), "the query string")?;
        match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => {
                let text = rejection.body_text();
                // "Failed to deserialize query string: limit: invalid digit found in string"
                let text = text.split_once("query string: ").map_or(text.as_str(), |(_, rest)| rest);
                Err(parameter(text))
            }
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        refuse_nul(parts.uri.path(), "the path")?;
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(PathRejection::FailedToDeserializePathParams(failed)) => Err(match failed.kind() {
                ErrorKind::ParseErrorAtKey { key, value, .. } => {
                    Problem::malformed("A parameter of the path is not valid.")
                        .with_field(key.as_str(), format!("{:?} is not valid here", shorten(value)))
                }
                ErrorKind::DeserializeError { key, message, .. } => {
                    Problem::malformed("A parameter of the path is not valid.")
                        .with_field(key.as_str(), for_people(message))
                }
                other => {
                    tracing::debug!(error = %other, "a path could not be read");
                    Problem::malformed("The path is not valid.")
                }
            }),
            Err(other) => Err(Problem::internal(&other)),
        }
    }
}

/// A problem for a body that could not be read: too large, or broken off.
pub(super) fn body_problem(status: StatusCode) -> Problem {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The body is too large")
        }
        _ => Problem::malformed("The body could not be read to its end."),
    }
}

/// Parses a JSON body, naming the field that is wrong.
///
/// # Errors
/// 422 with the field and what is wrong with it, or 400 for what is no JSON.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let parsed: Result<T, _> = serde_path_to_error::deserialize(Named(&mut json));
    match parsed {
        Ok(value) => {
            json.end().map_err(|error| Problem::malformed(not_json("more than one JSON value", &error)))?;
            refuse_nul_in_json(bytes)?;
            Ok(value)
        }
        Err(error) => {
            let path = error.path().to_string();
            let inner = error.into_inner();
            if !inner.is_data() {
                return Err(Problem::malformed(not_json("no JSON", &inner)));
            }
            let message = without_places(&inner.to_string());
            Err(Problem::field(named(&path, &message), for_people(&message)))
        }
    }
}

/// Where a body stops being JSON: its author looks for that place.
fn not_json(what: &str, error: &serde_json::Error) -> String {
    format!("The body is {what}, from line {}, column {} on.", error.line(), error.column())
}

/// serde reports an unknown or missing field at its parent; the field's own name is in the message.
fn named(path: &str, message: &str) -> String {
    let parent = if path == "." { "" } else { path };
    let field = ["unknown field `", "missing field `", "duplicate field `"]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix))
        .and_then(|rest| rest.split_once('`'))
        .map(|(field, _)| field);
    match field {
        None => path.to_owned(),
        Some(field) if parent.is_empty() || parent == field => field.to_owned(),
        Some(field) if parent.ends_with(&format!(".{field}")) => parent.to_owned(),
        Some(field) => format!("{parent}.{field}"),
    }
}

/// Refuses a NUL in any string of a body. Only a body that spells one is parsed a second time.
fn refuse_nul_in_json(bytes: &[u8]) -> Result<(), Problem> {
    if !bytes.windows(6).any(|window| window == b"\\u0000") {
        return Ok(());
    }
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| Problem::malformed(not_json("no JSON", &error)))?;
    match nul_at(&value, String::new()) {
        Some(path) => Err(Problem::field(path, "has a NUL character (\\u0000) in it")),
        None => Ok(()),
    }
}

fn nul_at(value: &Value, path: String) -> Option<String> {
    match value {
        Value::String(text) => text.contains('\0').then_some(path),
        Value::Array(items) => {
            items.iter().enumerate().find_map(|(index, item)| nul_at(item, format!("{path}[{index}]")))
        }
        Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            let dot = if path.is_empty() { "" } else { "." };
            let here = format!("{path}{dot}{}", name.replace('\0', "\\u0000"));
            if name.contains('\0') { Some(here) } else { nul_at(value, here) }
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn refuse_nul(text: &str, place: &str) -> Result<(), Problem> {
    if text.contains("%00") {
        return Err(Problem::malformed(format!("There is a NUL character (%00) in {place}.")));
    }
    Ok(())
}

fn parameter(text: &str) -> Problem {
    let problem = Problem::malformed("A parameter of the query string is not valid.");
    let named = ["unknown field `", "missing field `", "duplicate field `"]
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix))
        .and_then(|rest| rest.split_once('`'));
    match (named, text.split_once(": ")) {
        (Some((field, _)), _) => problem.with_field(field, for_people(text)),
        (None, Some((field, message))) => problem.with_field(field, for_people(message)),
        (None, None) => problem,
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Order {
        customer: String,
        items: Vec<Item>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Item {
        quantity: u8,
    }

    fn wrong(body: &str) -> (u16, Vec<String>) {
        let problem = parse::<Order>(body.as_bytes()).unwrap_err();
        (problem.status().as_u16(), problem.errors().iter().map(|error| error.field.clone()).collect())
    }

    #[test]
    fn each_kind_of_wrong_body_names_its_field() {
        for (body, status, field) in [
            (r#"{"customer":"a","items":[{"quantity":1},{"quantity":"x"}]}"#, 422, "items[1].quantity"),
            (r#"{"customer":"a","items":[{"quantity":300}]}"#, 422, "items[0].quantity"),
            (r#"{"customer":"a","items":[{"quantity":-1}]}"#, 422, "items[0].quantity"),
            (r#"{"customer":"a","items":[{"quantity":1,"qty":2}]}"#, 422, "items[0].qty"),
            (r#"{"customer":"a","items":[{}]}"#, 422, "items[0].quantity"),
            (r#"{"items":[]}"#, 422, "customer"),
            (r#"{"customer":"a","items":[],"total":1}"#, 422, "total"),
            (r#"{"customer":"a","customer":"b","items":[]}"#, 422, "customer"),
            (r#"{"customer":"a\u0000b","items":[]}"#, 422, "customer"),
            (r#"["a",[{"quantity":1}]]"#, 422, "."),
            (r#"{"customer":"a","items":[{"quantity":1},[1]]}"#, 422, "items[1]"),
        ] {
            assert_eq!(wrong(body), (status, vec![field.to_owned()]), "{body}");
        }
    }

    #[test]
    fn what_is_not_json_is_malformed() {
        for body in ["", "{", "{]", "{\"customer\":\"a\",\"items\":[]} x", "\u{0}"] {
            assert_eq!(wrong(body).0, 400, "{body:?}");
        }
        assert_eq!(parse::<Order>(b"{\"customer\":\"\xff\",\"items\":[]}").unwrap_err().status().as_u16(), 400);
        assert_eq!(parse::<Order>(&b"[".repeat(100_000)).unwrap_err().status().as_u16() / 100, 4);
    }
}
