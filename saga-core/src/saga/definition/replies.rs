//! The replies that a step can read: a flat tuple that grows by one with each remote step.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// The replies of the steps so far, in order: `()`, `(A,)`, `(A, B)`, up to twelve.
pub trait Replies: Sized + Send + Sync + 'static {
    /// Reads them from what the engine stored.
    ///
    /// # Errors
    /// A value is not what its step's reply is.
    fn decode(values: &[&Value]) -> Result<Self, serde_json::Error>;
}

/// A tuple of replies with one more at its end.
#[diagnostic::on_unimplemented(
    message = "a saga has at most twelve steps with replies",
    note = "split the saga, or let one participant do what several steps do now"
)]
pub trait And<T>: Replies {
    /// The tuple with the reply at its end.
    type With: Replies;
}

fn at<T: DeserializeOwned>(values: &[&Value], index: usize) -> Result<T, serde_json::Error> {
    T::deserialize(*values.get(index).unwrap_or(&&Value::Null))
}

macro_rules! replies {
    ($($name:ident $index:tt),*) => {
        impl<$($name: DeserializeOwned + Send + Sync + 'static),*> Replies for ($($name,)*) {
            #[allow(unused_variables)]
            fn decode(values: &[&Value]) -> Result<Self, serde_json::Error> {
                Ok(($(at::<$name>(values, $index)?,)*))
            }
        }
    };
}

macro_rules! and {
    ($($name:ident),*) => {
        impl<$($name: DeserializeOwned + Send + Sync + 'static,)* Next: DeserializeOwned + Send + Sync + 'static>
            And<Next> for ($($name,)*)
        {
            type With = ($($name,)* Next,);
        }
    };
}

replies!();
replies!(A 0);
replies!(A 0, B 1);
replies!(A 0, B 1, C 2);
replies!(A 0, B 1, C 2, D 3);
replies!(A 0, B 1, C 2, D 3, E 4);
replies!(A 0, B 1, C 2, D 3, E 4, F 5);
replies!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
replies!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);
replies!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8);
replies!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9);
replies!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10);
replies!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11);
and!();
and!(A);
and!(A, B);
and!(A, B, C);
and!(A, B, C, D);
and!(A, B, C, D, E);
and!(A, B, C, D, E, F);
and!(A, B, C, D, E, F, G);
and!(A, B, C, D, E, F, G, H);
and!(A, B, C, D, E, F, G, H, I);
and!(A, B, C, D, E, F, G, H, I, J);
and!(A, B, C, D, E, F, G, H, I, J, K);
