// Commands for the cases beside it; not a case itself.
use saga_core::{
    command::{Command, Done, Never},
    topic::Topic,
};
use serde::{Deserialize, Serialize};

static SHOP: Topic = Topic::events("shop", 1);
static STORE: Topic = Topic::events("store", 1);

macro_rules! command {
    ($name:ident, $rejection:ty) => {
        command!($name, $rejection, SHOP);
    };
    ($name:ident, $rejection:ty, $topic:ident) => {
        #[derive(Serialize, Deserialize)]
        pub struct $name {
            pub id: u32,
        }
        impl Command for $name {
            const TYPE: &'static str = stringify!($name);
            const TOPIC: &'static Topic = &$topic;
            type Reply = Done;
            type Rejection = $rejection;
        }
    };
}

#[derive(Serialize, Deserialize)]
pub struct SoldOut;

#[derive(Serialize, Deserialize)]
pub struct Order {
    pub id: u32,
}

command!(Reserve, SoldOut);
command!(Release, Never);
command!(ReleaseAtStore, Never, STORE);
command!(RefusableRelease, SoldOut);
command!(Pay, SoldOut);
command!(Ship, Never);
command!(RefusableShip, SoldOut);
