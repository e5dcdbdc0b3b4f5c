//! Fields by their names alone. `serde` takes a struct from an array as well, its fields in the order of their
//! declaration. Such an array means something else after the next field is added, and was never meant to be offered.
//!
//! [`Named`] stands around a deserializer, and around everything that the deserializer hands out: so the rule holds at
//! every level. The one way around it is a buffer of `serde`'s own (`flatten`, `untagged`, an internal `tag`), which it
//! does not see.

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use std::fmt;

/// A deserializer, or a part of one, that reads a struct from an object only.
pub(crate) struct Named<T>(pub(crate) T);

/// A visitor within a [`Named`] deserializer.
struct Within<V> {
    visitor: V,
    /// Whether the visited value is a struct.
    is_struct: bool,
}

fn of_any<V>(visitor: V) -> Within<V> {
    Within { visitor, is_struct: false }
}

fn of_struct<V>(visitor: V) -> Within<V> {
    Within { visitor, is_struct: true }
}

macro_rules! forward_to_deserializer {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.0.$method(of_any(visitor))
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Named<D> {
    type Error = D::Error;

    forward_to_deserializer! {
        deserialize_any deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32 deserialize_f64
        deserialize_char deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf deserialize_option
        deserialize_unit deserialize_seq deserialize_map deserialize_identifier deserialize_ignored_any
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_unit_struct(name, of_any(visitor))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_newtype_struct(name, of_any(visitor))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_tuple(len, of_any(visitor))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_tuple_struct(name, len, of_any(visitor))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_struct(name, fields, of_struct(visitor))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_enum(name, variants, of_any(visitor))
    }

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

macro_rules! forward_to_visitor {
    ($($method:ident($kind:ty))*) => {$(
        fn $method<E: Error>(self, value: $kind) -> Result<V::Value, E> {
            self.visitor.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Within<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.visitor.expecting(f)
    }

    forward_to_visitor! {
        visit_bool(bool) visit_i8(i8) visit_i16(i16) visit_i32(i32) visit_i64(i64) visit_i128(i128) visit_u8(u8)
        visit_u16(u16) visit_u32(u32) visit_u64(u64) visit_u128(u128) visit_f32(f32) visit_f64(f64) visit_char(char)
        visit_str(&str) visit_borrowed_str(&'de str) visit_string(String) visit_bytes(&[u8])
        visit_borrowed_bytes(&'de [u8]) visit_byte_buf(Vec<u8>)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Named(from))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, from: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_newtype_struct(Named(from))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        if self.is_struct {
            return Err(A::Error::invalid_type(Unexpected::Seq, &"an object with its fields by their names"));
        }
        self.visitor.visit_seq(Named(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_map(Named(fields))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_enum(Named(variant))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Named<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Named(from))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Named<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Named(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Named<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_key_seed(Named(seed))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(Named(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Named<A> {
    type Error = A::Error;
    type Variant = Named<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let (value, variant) = self.0.variant_seed(Named(seed))?;
        Ok((value, Named(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Named<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.0.newtype_variant_seed(Named(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(len, of_any(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, of_struct(visitor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Point {
        x: i64,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Wrapped(Point);

    #[derive(Debug, PartialEq, Deserialize)]
    enum Shape {
        Dot(Point),
        Line { from: Point },
        Pair(i64, Point),
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Drawing {
        maybe: Option<Point>,
        wrapped: Wrapped,
        many: Vec<Point>,
        named: BTreeMap<String, Point>,
        shapes: Vec<Shape>,
        pair: (i64, i64),
        any: serde_json::Value,
    }

    const DRAWING: &str = r#"{"maybe":{"x":1},"wrapped":{"x":2},"many":[{"x":3}],"named":{"n":{"x":4}},
        "shapes":[{"Dot":{"x":5}},{"Line":{"from":{"x":6}}},{"Pair":[7,{"x":8}]}],"pair":[9,9],"any":[[1],{"x":[2]}]}"#;

    fn read(text: &str) -> Result<Drawing, serde_json::Error> {
        Drawing::deserialize(Named(&mut serde_json::Deserializer::from_str(text)))
    }

    #[test]
    fn an_object_is_read_as_ever_and_lists_stay_lists() {
        assert_eq!(read(DRAWING).unwrap(), serde_json::from_str(DRAWING).unwrap());
    }

    #[test]
    fn an_array_in_the_place_of_an_object_is_refused_at_every_level() {
        for n in [1, 2, 3, 4, 5, 6, 8] {
            let (object, array) = (format!(r#"{{"x":{n}}}"#), format!("[{n}]"));
            let positional = DRAWING.replacen(&object, &array, 1);
            assert_ne!(positional, DRAWING);
            assert!(serde_json::from_str::<Drawing>(&positional).is_ok(), "serde takes it: {positional}");
            let error = read(&positional).unwrap_err().to_string();
            assert!(error.contains("an object with its fields by their names"), "{error}");
        }
        let variant = DRAWING.replace(r#"{"from":{"x":6}}"#, r#"[{"x":6}]"#);
        assert!(serde_json::from_str::<Drawing>(&variant).is_ok() && read(&variant).is_err());
        assert!(read(r#"[null,{"x":1},[],{},[],[1,2],null]"#).is_err());
    }
}
