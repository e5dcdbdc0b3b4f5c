//! `If-Match`: only what the client has seen is changed (RFC 9110, 13.1.1).
//!
//! | header | what it says |
//! |---|---|
//! | none | nothing |
//! | `*` | whatever there is |
//! | `"3"`, or a list of such tags | one of these; compared strongly, so a weak tag is none |
//! | anything else, also an empty one | 400 |

use super::problem::Problem;
use http::{HeaderMap, header};

/// The versions that a client has seen, by its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IfMatch {
    /// `*`: any version that there is.
    Any,
    /// One of these tags, without their quotes.
    Tags(Vec<String>),
}

impl IfMatch {
    /// Reads the header, if it is there.
    ///
    /// # Errors
    /// When the header is no list of entity tags.
    pub fn read(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        let refuse = || {
            Problem::malformed("If-Match is neither `*` nor a list of ETags.")
                .with_field("If-Match", "has to be `*`, or ETags in quotes")
        };
        let mut values = headers.get_all(header::IF_MATCH).iter().peekable();
        if values.peek().is_none() {
            return Ok(None);
        }
        let mut tags = Vec::new();
        let (mut any, mut some) = (false, false);
        for value in values {
            let mut rest = value.to_str().map_err(|_| refuse())?.trim();
            // RFC 9110, section 5.6.1.2: an empty element of a list is none.
            rest = rest.trim_start_matches([',', ' ', '\t']);
            while !rest.is_empty() {
                some = true;
                rest = match rest.strip_prefix('*') {
                    Some(rest) => {
                        any = true;
                        rest
                    }
                    None => tag(rest, &mut tags).ok_or_else(refuse)?,
                };
                rest = rest.trim_start();
                match rest.strip_prefix(',') {
                    Some(next) => rest = next.trim_start_matches([',', ' ', '\t']),
                    None if rest.is_empty() => {}
                    None => return Err(refuse()),
                }
            }
        }
        match (any, some) {
            (_, false) => Err(refuse()),
            (true, _) if !tags.is_empty() => Err(refuse()),
            (true, _) => Ok(Some(Self::Any)),
            (false, _) => Ok(Some(Self::Tags(tags))),
        }
    }

    /// Whether the client has seen the current version; `tag` is its entity tag, without quotes.
    #[must_use]
    pub fn allows(&self, tag: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Tags(tags) => tags.iter().any(|seen| seen == tag),
        }
    }
}

/// Reads one tag; a weak one is well-formed, and matches nothing.
fn tag<'a>(text: &'a str, tags: &mut Vec<String>) -> Option<&'a str> {
    let (weak, text) = text.strip_prefix("W/").map_or((false, text), |text| (true, text));
    let (tag, rest) = text.strip_prefix('"')?.split_once('"')?;
    tags.extend((!weak).then(|| tag.to_owned()));
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[&str]) -> Result<Option<IfMatch>, u16> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::IF_MATCH, value.parse().unwrap());
        }
        IfMatch::read(&headers).map_err(|problem| problem.status().as_u16())
    }

    #[test]
    fn a_star_is_anything_a_list_is_one_of_it_and_what_is_neither_is_refused() {
        let tags = |tags: &[&str]| Ok(Some(IfMatch::Tags(tags.iter().map(|tag| (*tag).to_owned()).collect())));
        for (values, is) in [
            (&[][..], Ok(None)),
            (&["*"], Ok(Some(IfMatch::Any))),
            (&["\"3\""], tags(&["3"])),
            (&["\"3\", \"4\"", "\"5\""], tags(&["3", "4", "5"])),
            (&[", \"3\",, \"4\" ,"], tags(&["3", "4"])),
            (&["W/\"3\""], tags(&[])),
            (&[""], Err(400)),
            (&[","], Err(400)),
            (&["3"], Err(400)),
            (&["\"3"], Err(400)),
            (&["*, \"3\""], Err(400)),
            (&["\"3\" \"4\""], Err(400)),
        ] {
            assert_eq!(read(values), is, "{values:?}");
        }
    }
}
