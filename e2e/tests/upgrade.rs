//! Two builds run at once: the last release's programs and today's, each service upgraded and rolled back under load.
//!
//! `make upgrade` builds the last release and names its programs in `UPGRADE_FROM_BIN`.

use e2e::{
    faults::Chance,
    load::load,
    orders::Wish,
    platform::{Platform, alone_with, for_breaking},
};
use saga_core::testkit::eventually;
use stack::service::{Service, binary};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Orders that are accepted between two moves.
const BETWEEN: usize = 15;
/// How long those may take.
const SOON: Duration = Duration::from_secs(120);

/// The folders of the last release's programs and of today's.
fn builds() -> (PathBuf, PathBuf) {
    let old = std::env::var_os("UPGRADE_FROM_BIN").expect("UPGRADE_FROM_BIN names the last release's programs");
    let new = binary("order-svc").expect("today's programs are built");
    (old.into(), new.parent().expect("a program is in a folder").to_owned())
}

async fn some_orders(platform: &Platform) {
    let before = platform.accepted();
    eventually(SOON, || async { (platform.accepted() >= before + BETWEEN).then_some(()) }).await;
}

/// Upgrades a service, and runs a replica of the old build beside it. As chance has it, rolls it back and upgrades
/// again.
async fn upgrade(platform: &Platform, service: Service, old: &Path, new: &Path, chance: &mut Chance) {
    let running = platform.stack.service(service);
    let becomes = async |build: &Path| {
        slow_orders(platform).await;
        running.becomes(build).await.unwrap_or_else(|error| panic!("{service} from {}: {error}", build.display()));
        some_orders(platform).await;
    };
    println!("{service}: upgraded");
    becomes(new).await;
    if service != Service::Gateway {
        println!("{service}: the old build beside the new one");
        let beside = platform.stack.start_another(service).await.expect("an old replica starts on the new schema");
        some_orders(platform).await;
        beside.process.stop().await;
    }
    if chance.below(2) == 0 {
        println!("{service}: rolled back, and upgraded again");
        becomes(old).await;
        becomes(new).await;
    }
}

#[test]
#[ignore = "needs the last release's programs: make upgrade"]
fn each_service_is_upgraded_and_rolled_back_under_load() {
    let (old, new) = builds();
    let mut config = for_breaking();
    config.programs = Some(old.clone());
    alone_with(config, async |platform| {
        let chance = Chance::new("upgrade");
        let done = CancellationToken::new();
        let orders = async {
            while !done.is_cancelled() {
                load(platform, 40, chance.clone()).await;
            }
        };
        let moves = async {
            let mut chance = chance.clone();
            let mut left = Service::ALL.to_vec();
            while !left.is_empty() {
                let next = usize::try_from(chance.below(left.len() as u64)).unwrap_or_default();
                upgrade(platform, left.swap_remove(next), &old, &new, &mut chance).await;
            }
            // All services go the whole way back, and forth, with sagas of both builds open.
            for build in [&old, &new] {
                for service in Service::ALL {
                    slow_orders(platform).await;
                    let running = platform.stack.service(service);
                    running.becomes(build).await.unwrap_or_else(|error| panic!("{service}: {error}"));
                }
                some_orders(platform).await;
            }
            done.cancel();
        };
        tokio::join!(orders, moves);
        platform.settles().await;
    });
}

/// Places orders whose payment is answered slowly: their step is open while a service changes its build.
async fn slow_orders(platform: &Platform) {
    let slow = platform.item("slow", 100, 1_000).await;
    for _ in 0..3 {
        platform.place(&Wish::of(&slow, 1).paid_with("tok_slow")).await;
    }
}
