//! Adds to an API's document what each of its operations may answer. The extractors, the limits and the listener's
//! roles answer before a handler does, so no handler can be trusted to declare it.

use super::problem::Problem;
use utoipa::{
    PartialSchema as _, ToSchema as _,
    openapi::{
        Components, Content, ObjectBuilder, OpenApi, Ref, RefOr, Required, Response, Type,
        path::{Operation, Parameter, ParameterBuilder, ParameterIn, PathItem},
    },
};

const PROBLEM: &str = "application/problem+json";

/// The answers that a request of any kind may get.
const ANY: &[(u16, &str)] = &[
    (400, "The request cannot be understood"),
    (421, "The request's Host or Origin is not one of this listener's"),
    (500, "Something went wrong here; it is logged under the answer's `x-request-id`"),
    (503, "Not at the moment; the same request may work soon"),
];
const WITH_PARAMETERS: &[(u16, &str)] = &[(400, "A parameter is not valid")];
const WITH_BODY: &[(u16, &str)] = &[
    (400, "The body is not JSON, or cut off"),
    (415, "The body has another content type than JSON"),
    (422, "A field of the body is not valid"),
];
const OF_CHANGES: &[(u16, &str)] = &[(408, "The body did not arrive in time"), (413, "The body is too large")];
const OF_POSTS: &[(u16, &str)] = &[(415, "It has neither a content type nor a header that a form cannot send")];
const BY_ROLE: &[(u16, &str)] = &[
    (401, "A token is needed"),
    (403, "The token's role may not do this"),
    (429, "Too many wrong tokens came from this address"),
];

/// Completes the document with all that its operations may answer.
#[must_use]
pub fn complete(document: OpenApi) -> OpenApi {
    completed(document, &[])
}

/// Completes the document of an API behind the admin listener's roles.
#[must_use]
pub fn complete_by_role(document: OpenApi) -> OpenApi {
    completed(document, BY_ROLE)
}

fn completed(mut document: OpenApi, also: &[(u16, &str)]) -> OpenApi {
    for item in document.paths.paths.values_mut() {
        let shared = item.parameters.as_ref().is_some_and(|parameters| !parameters.is_empty());
        for (operation, changes, posts) in operations(item) {
            let parameters = shared || operation.parameters.as_ref().is_some_and(|parameters| !parameters.is_empty());
            let body = operation.request_body.is_some();
            let kinds = [(true, ANY), (body, WITH_BODY), (parameters, WITH_PARAMETERS), (true, also)].into_iter();
            let kinds = kinds.chain([(changes, OF_CHANGES), (posts, OF_POSTS)]);
            let answers = kinds.filter(|(may, _)| *may).flat_map(|(_, answers)| answers);
            answers.for_each(|(status, description)| declare(operation, *status, description));
            if posts && !body {
                operation.parameters.get_or_insert_default().push(RefOr::T(requested_with()));
            }
            operation.responses.responses.iter_mut().for_each(|(status, response)| as_problem(status, response));
        }
    }
    let components = document.components.get_or_insert_with(Components::default);
    let mut schemas = vec![(Problem::name().into_owned(), Problem::schema())];
    Problem::schemas(&mut schemas);
    for (name, schema) in schemas {
        components.schemas.entry(name).or_insert(schema);
    }
    document
}

/// The parameter by which a POST without a body, and without another such header, shows that no form sent it.
fn requested_with() -> Parameter {
    let description = "Any value: a header that a form cannot send. Not needed with `content-type: application/json`, a bearer token, \
                       an Idempotency-Key, an If-Match, or an Origin of this listener";
    let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1));
    let parameter = ParameterBuilder::new().name("X-Requested-With").parameter_in(ParameterIn::Header);
    parameter.required(Required::False).description(Some(description)).schema(Some(text)).build()
}

/// Each operation, whether it may change something, and whether it is a POST.
fn operations(item: &mut PathItem) -> impl Iterator<Item = (&mut Operation, bool, bool)> {
    let PathItem { get, put, post, delete, patch, .. } = item;
    let all =
        [(get, false, false), (put, true, false), (post, true, true), (delete, true, false), (patch, true, false)];
    all.into_iter().filter_map(|(operation, changes, posts)| Some((operation.as_mut()?, changes, posts)))
}

fn declare(operation: &mut Operation, status: u16, description: &str) {
    let responses = &mut operation.responses.responses;
    let range = format!("{}XX", status / 100);
    if !responses.contains_key(&range) {
        responses.entry(status.to_string()).or_insert_with(|| RefOr::T(Response::new(description)));
    }
}

/// Declares an error as a problem, whatever its handler declared.
fn as_problem(status: &str, response: &mut RefOr<Response>) {
    let RefOr::T(response) = response else { return };
    if response.description.is_empty() {
        response.description = described(status).into();
    }
    if matches!(status.as_bytes().first(), Some(b'4' | b'5')) {
        // Other content of the answer is the handler's own declaration.
        response.content.retain(|_, content| !is_problem(content));
        let content = Content::new(Some(Ref::from_schema_name(Problem::name())));
        response.content.insert(PROBLEM.to_owned(), RefOr::T(content));
    }
}

fn is_problem(content: &RefOr<Content>) -> bool {
    let RefOr::T(Content { schema: Some(RefOr::Ref(schema)), .. }) = content else { return false };
    schema.ref_location.rsplit('/').next() == Some(&*Problem::name())
}

fn described(status: &str) -> &'static str {
    match status {
        "404" => "There is no such thing",
        "409" => "It does not fit the state that things are in",
        "412" => "It was changed in the meantime",
        "422" => "A field of the body is not valid",
        "428" => "An If-Match is needed",
        status if status.starts_with('2') => "It worked",
        _ => "It did not work",
    }
}
