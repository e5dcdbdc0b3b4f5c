//! The checks can fail: each finds the violation that it is shown, and finds nothing in good code.

use crate::{
    Violation, arrows, bounds, docs, expand, files, order, purity,
    source::{Tree, code, paths, without_tests},
    words,
};

fn one(found: &[Violation], part: &str) {
    assert!(found.len() == 1 && found[0].contains(part), "expected one violation with {part:?}, found {found:?}");
}

#[test]
fn an_arrow_that_is_not_drawn_is_found() {
    let crates = |from: &str, to: &str| {
        let all = ["saga-core", "contracts", "outbox-relay", "order-svc", "payment-svc", "stack", "e2e"];
        all.iter()
            .map(|name| ((*name).to_owned(), if *name == from { vec![to.to_owned()] } else { Vec::new() }))
            .collect()
    };
    one(&arrows::check(&crates("order-svc", "payment-svc")), "order-svc must not depend on payment-svc");
    one(&arrows::check(&crates("outbox-relay", "contracts")), "outbox-relay must not depend on contracts");
    one(&arrows::check(&crates("saga-core", "contracts")), "saga-core must not depend on contracts");
    one(&arrows::check(&crates("contracts", "sqlx")), "contracts must not depend on sqlx");
    one(&arrows::check(&crates("order-svc", "backoff")), "must not depend on backoff");
    assert!(arrows::check(&crates("order-svc", "contracts")).is_empty());
    one(&arrows::check(&crates("stack", "order-svc")), "stack must not depend on order-svc");
    assert!(arrows::check(&crates("e2e", "order-svc")).is_empty());
    one(&arrows::check(&[("new-svc".to_owned(), Vec::new())].into()), "does not know");
}

#[test]
fn a_module_that_uses_a_later_one_is_found() {
    let found = |from: &str, text: &str| {
        let files = [(from, text), ("saga-core/src/service/admin.rs", ""), ("saga-core/src/id.rs", "")];
        order::saga_core(&Tree::of(&files))
    };
    one(
        &found("saga-core/src/http/sagas.rs", "use crate::{id::SagaId, service::admin::Role};"),
        "must not use service",
    );
    one(&found("saga-core/src/http/sagas.rs", "use super::super::service::admin::Role;"), "must not use service");
    one(&found("saga-core/src/news.rs", ""), "has no place");
    assert!(found("saga-core/src/http/sagas.rs", "use crate::id::SagaId;").is_empty());
    assert!(found("saga-core/src/testkit/database.rs", "use crate::service::admin::AdminAuth;").is_empty());
}

#[test]
fn a_process_that_is_spoken_of_as_a_person_and_a_long_sentence_are_found() {
    let found = |text: &str| words::of_programs(&Tree::of(&[("saga-core/src/outbox.rs", text)]));
    one(&found("fn f() { say(\"the lease is somebody else's\"); }"), "somebody");
    one(&found("fn f() { say(\"set it to the name that somebody gave\"); }"), "somebody");
    one(&found("fn f() { say(\"a row that was \\\n    looked at\"); }"), "looked at");
    one(&found(&format!("fn f() {{ say(\"{}end\"); }}", "one more word ".repeat(9))), "more than 25 words");
    let comments = |text: &str| words::of_comments(&Tree::of(&[("saga-core/src/outbox.rs", text)]));
    one(&comments("fn f() {} \n    // Whoever has the lease."), "whoever");
    one(&comments("// A row that is looked\n// at again."), "looked at");
    assert!(comments("/// An operator who retries.\nfn told() {}").is_empty());
    for fine in [
        "// somebody\nfn f() { say(\"the lease is another process's\"); }",
        "fn f() { sql(\"select nobody from a\"); }",
        "#[cfg(test)]\nmod tests { fn f() { say(\"nobody came\"); } }",
        &format!("fn f() {{ say(\"{}\"); }}", "Ten short words are one sentence, and here it ends. ".repeat(9)),
    ] {
        assert!(found(fine).is_empty(), "{fine}");
    }
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let found = |link: &str| {
        let text = format!("# Map\n\nSee [this]({link}).\n\n```text\n[no](link)\n```\n\n## Way of one order\n");
        docs::links(&Tree::of(&[("docs/map.md", &text)]), |path| {
            path == "saga-core/src/lib.rs" || path == "docs/map.md"
        })
    };
    one(&found("../saga-core/src/gone.rs"), "leads nowhere");
    one(&found("../../saga-core/src/lib.rs"), "leads nowhere");
    one(&found("#way-of-an-order"), "no heading");
    one(&found("map.md#gone"), "no heading");
    for fine in ["../saga-core/src/lib.rs", "#way-of-one-order", "map.md#map", "https://example.org/x"] {
        assert!(found(fine).is_empty(), "{fine}");
    }
}

#[test]
fn a_document_that_the_summary_does_not_name_is_found() {
    let found = |summary: &str| {
        docs::summary(&Tree::of(&[("docs/SUMMARY.md", summary), ("README.md", "# A"), ("docs/map.md", "# Map")]))
    };
    one(&found("- [A](../README.md)"), "does not name docs/map.md");
    assert!(found("- [A](../README.md)\n  - [Map](map.md)").is_empty());
}

#[test]
fn a_public_module_without_an_example_is_found() {
    let found = |module: &str| {
        files::examples(&Tree::of(&[
            ("saga-core/src/lib.rs", "pub mod id;\nmod inner;"),
            ("saga-core/src/id/new.rs", module),
            ("saga-core/src/inner.rs", "//! Inner."),
        ]))
    };
    one(&found("//! Ids.\n//! ```text\n//! a -> b\n//! ```text"), "id shows no example");
    assert!(found("//! ```no_run\n//! new();\n//! ```").is_empty());
}

#[test]
fn a_constant_that_does_not_say_what_it_bounds_is_found() {
    let found = |line: &str| files::constants(&Tree::of(&[("saga-core/src/a.rs", line)]));
    one(&found("pub(crate) const PATIENCE: Duration = Duration::from_secs(3);"), "PATIENCE does not say");
    for fine in ["const ANSWER_MAX: Duration = X;", "const PAUSES: Backoff = X;", "    const MAX: u32 = 200;"] {
        assert!(found(fine).is_empty(), "{fine}");
    }
}

#[test]
fn code_of_a_document_that_the_tree_has_not_is_found() {
    let found = |line: &str| {
        let text = format!("```rust\nfn main() {{\n    {line}\n}}\n```\n");
        let source = "fn main() {\n    launch(a).await\n}\n/// x.example();";
        docs::code(&Tree::of(&[("README.md", &text), ("saga-core/src/lib.rs", source)]))
    };
    one(&found("launch(b).await"), "no source has this line");
    assert!(found("launch(a).await").is_empty() && found("x.example();").is_empty());
}

#[test]
fn a_long_sentence_of_a_document_is_found() {
    let found = |text: &str| docs::language(&Tree::of(&[("docs/map.md", text)]));
    one(&found(&format!("- {}end.", "one more word\n  ".repeat(9))), "more than 25 words");
    one(&found("Whoever holds the lease publishes."), "whoever");
    for fine in [
        &format!("{}.", "Six words are one short sentence. ".repeat(9)),
        &format!("- {}", "a list item has no end\n- ".repeat(9)),
        &format!("| {} |", "whoever is in a table ".repeat(9)),
        &format!("`{}`", "words of code are one ".repeat(9)),
    ] {
        assert!(found(fine).is_empty(), "{fine}");
    }
}

#[test]
fn modules_that_need_each_other_in_a_circle_are_found() {
    for package in order::WITHOUT_CIRCLES {
        let found = |store: &str, text: &str| {
            let api = format!("{package}/src/api.rs");
            let [orders, store] = ["orders.rs", store].map(|file| format!("{package}/src/{file}"));
            let files = [(&*api, "use crate::orders::Orders;"), (&*orders, "use crate::store::rows;"), (&*store, text)];
            order::circles(&Tree::of(&files))
        };
        for (store, text) in [
            ("store.rs", "use crate::api::View;"),
            ("store/mod.rs", "use crate::{api::{self, View}, id::Id};"),
            ("store/rows.rs", "use super::super::api::View;"),
            ("store/rows.rs", "fn f() -> usize { crate::api::views() }"),
            ("store.rs", "pub(crate) use super::api::*;"),
        ] {
            let circle = found(store, text);
            assert!(circle.len() == 3 && circle[0].starts_with(package), "{package}, {store}, {text}: {circle:?}");
        }
        for (store, text) in [
            ("store.rs", "use crate::id::Id;"),
            ("store/rows.rs", "use super::Store;"),
            ("store.rs", "// use crate::api::View;"),
            ("store.rs", "#[cfg(test)]\nmod tests { use crate::api::View; }"),
            ("testkit/store.rs", "use crate::api::View;"),
        ] {
            assert!(found(store, text).is_empty(), "{package}, {store}, {text}");
        }
    }
}

#[test]
fn a_circle_of_two_modules_or_in_a_folder_is_found_and_a_parents_use_is_none() {
    let found = |files: &[(&str, &str)]| order::circles(&Tree::of(files));
    let stream = ("outbox-relay/src/stream.rs", "use crate::session::Session;");
    let session = ("outbox-relay/src/session.rs", "mod fate;\nuse fate::Fate;");
    assert_eq!(found(&[stream, session, ("outbox-relay/src/session/fate.rs", "use crate::stream::Shared;")]).len(), 2);
    assert!(found(&[stream, session, ("outbox-relay/src/session/fate.rs", "use super::Session;")]).is_empty());
    let parked = ("outbox-relay/src/admin/parked.rs", "use super::retries::topics;");
    let circle = found(&[parked, ("outbox-relay/src/admin/retries.rs", "use super::parked::Row;")]);
    assert!(circle.len() == 2 && circle[0].starts_with("outbox-relay/src/admin"), "{circle:?}");
    let admin = ("outbox-relay/src/admin/mod.rs", "mod parked;\npub(crate) use parked::list;");
    assert!(found(&[admin, parked, ("outbox-relay/src/admin/retries.rs", "use super::Failed;")]).is_empty());
}

#[test]
fn io_in_a_pure_module_is_found_however_it_is_written() {
    for text in [
        "use sqlx::PgPool;",
        "use {serde::Serialize, tokio};",
        "use std::{fmt};\nuse axum::{Router, routing::get};",
        "fn f() { rdkafka::producer::new(); }",
        "#[tokio::main] async fn main() {}",
        "pub(crate) use ::sqlx::query as q;",
    ] {
        let found = purity::no_io(&Tree::of(&[("order-svc/src/domain.rs", text)]));
        assert_eq!(found.len(), 1, "{text}: {found:?}");
    }
    for text in [
        "// use sqlx::PgPool;",
        "/* sqlx::query */",
        "const S: &str = \"sqlx::query\"; const R: &str = r#\"tokio::\"spawn\"#;",
        "#[cfg(test)]\nmod tests { use tokio::test; fn f() { { sqlx::query() } } }",
        "fn f<'a>(x: &'a str) -> char { '\"' }",
        "let tokio = my::sqlx_like::thing();",
    ] {
        let found = purity::no_io(&Tree::of(&[("order-svc/src/domain.rs", text)]));
        assert!(found.is_empty(), "{text}: {found:?}");
    }
}

#[test]
fn purity_spreads_to_whatever_a_pure_module_uses() {
    let through = |decide: &str, other: (&str, &str)| {
        purity::no_io(&Tree::of(&[("saga-core/src/saga/decide.rs", decide), other]))
    };
    let store = ("saga-core/src/saga/store.rs", "use sqlx::PgPool;");
    one(&through("use super::store::load;", store), "saga/store.rs (reached from");
    one(&through("use crate::saga::{store::load, state};", store), "saga/store.rs (reached from");
    one(&through("use super::{store};", store), "saga/store.rs (reached from");
    one(&through("mod inner;", ("saga-core/src/saga/decide/inner.rs", "use tokio::spawn;")), "decide/inner.rs");
    let clock = ("saga-core/src/clock.rs", "");
    one(&through("fn f() { crate::clock::now(); }", clock), "takes `now` as a parameter");
    assert!(through("use super::state::State;", store).is_empty());

    let contracts = ("contracts/src/orders.rs", "use saga_core::{command::Command, outbox::Tx};");
    let outbox = ("saga-core/src/outbox.rs", "use sqlx::Transaction;");
    one(&purity::no_io(&Tree::of(&[contracts, outbox])), "saga-core/src/outbox.rs (reached from contracts");
}

#[test]
fn another_user_of_backoff_or_of_the_clock_is_found() {
    one(&purity::backoff(&Tree::of(&[("saga-core/src/outbox.rs", "use backoff::ExponentialBackoff;")])), "backoff");
    assert!(purity::backoff(&Tree::of(&[("saga-core/src/retry.rs", "use backoff::ExponentialBackoff;")])).is_empty());
    assert!(purity::backoff(&Tree::of(&[("a/src/b.rs", "self.backoff.delay(1)")])).is_empty());

    for text in ["let t = std::time::Instant::now();", "OffsetDateTime::now_utc()", "time::SystemTime::now()"] {
        one(&purity::clock(&Tree::of(&[("payment-svc/src/store.rs", text)])), "saga_core::clock does");
    }
    assert!(purity::clock(&Tree::of(&[("payment-svc/src/store.rs", "clock::now()")])).is_empty());
    assert!(purity::clock(&Tree::of(&[("stack/src/run.rs", "Instant::now()")])).is_empty());
}

#[test]
fn an_engine_that_knows_orders_is_found() {
    one(&purity::engine_knows_no_orders(&Tree::of(&[("saga-core/src/saga/a.rs", "fn f(sku: &str) {}")])), "sku");
    assert!(purity::engine_knows_no_orders(&Tree::of(&[("saga-core/src/a.rs", "// an order's sku\n")])).is_empty());
}

#[test]
fn a_migration_that_would_not_be_embedded_is_found() {
    let embeds = ("order-svc/src/migrations.rs", "refinery::embed_migrations!(\"../migrations/order\");");
    let watches = ("order-svc/build.rs", "rerun-if-changed=../migrations/order");
    let check = |files: &[(&str, &str)]| files::migrations(&Tree::of(files));
    assert!(check(&[("migrations/order/V1__orders.sql", ""), embeds, watches]).is_empty());
    one(&check(&[("migrations/order/V1_orders.sql", "")]), "ignored by refinery");
    one(&check(&[("migrations/order/v1__orders.sql", "")]), "ignored by refinery");
    one(&check(&[("migrations/V1__orders.sql", "")]), "not in the folder of an owner");
    one(&check(&[("migrations/order/V1__a.sql", ""), ("migrations/order/V01__b.sql", ""), embeds, watches]), "twice");
    one(&check(&[("migrations/order/V1__orders.sql", "")]), "embedded in no binary");
    one(&check(&[("migrations/order/V1__orders.sql", ""), embeds]), "does not watch");
}

#[test]
fn a_long_main_a_long_file_and_a_silent_module_are_found() {
    let lines = |n: usize| "fn f() {}\n".repeat(n);
    one(&files::mains(&Tree::of(&[("order-svc/src/main.rs", &lines(41))])), "41 lines");
    assert!(files::mains(&Tree::of(&[("order-svc/src/main.rs", &lines(40))])).is_empty());
    one(&files::lengths(&Tree::of(&[("order-svc/src/store.rs", &lines(421))])), "421 lines");
    let tested = format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", lines(400), lines(400));
    assert!(files::lengths(&Tree::of(&[("order-svc/src/store.rs", &tested)])).is_empty());
    one(&files::module_docs(&Tree::of(&[("order-svc/src/store.rs", "use a;")])), "what it is for");
    one(&files::module_files(&Tree::of(&[("order-svc/src/api/mod.rs", "//! A.")])), "the file beside it");
    assert!(files::module_files(&Tree::of(&[("order-svc/src/api.rs", ""), ("a/tests/common/mod.rs", "")])).is_empty());
}

#[test]
fn the_reader_of_sources_sees_paths_and_not_what_only_looks_like_them() {
    let flat = paths(&code("use a::{self, b::{c, d as e}, f::*};\nfn g() { h::i::<J>(k::L); \"m::n\"; }"));
    assert_eq!(flat, ["a", "a::b::c", "a::b::d", "a::f", "h::i", "k::L"]);
    assert_eq!(without_tests("a #[cfg(test)] mod t { { } } b #[cfg(test)] use c; d").replace(' ', ""), "abd");
}

#[test]
fn a_migration_under_which_an_older_build_cannot_write_is_found() {
    for sql in [
        "alter table outbox drop column key;",
        "alter table saga rename column revision to version;",
        "alter table saga add column orchestrator text not null;",
        "alter table saga alter column step set not null;",
        "alter table inbox add unique (source);",
        "alter table saga alter column revision type bigint;",
        "alter table inbox add foreign key (source) references source (name);",
        "revoke insert on saga_event from service;",
        "create trigger checks before insert on inbox for each row execute function f();",
        "create unique index once on inbox (source);",
        "drop function outbox_append(text);",
        "alter table saga drop constraint saga_is_woken;",
        "alter table saga add constraint saga_is_small check (true) not valid;",
        "alter table saga add constraint saga_once unique (name);",
        "create or replace trigger t before insert on saga for each row execute function f();",
        "do $$ begin alter table saga drop column name; end $$;",
    ] {
        let found = expand::only(&Tree::of(&[("migrations/messaging/V8__next.sql", sql)]));
        assert_eq!(found.len(), 1, "{sql}: {found:?}");
        assert!(expand::only(&Tree::of(&[("migrations/messaging/V7__released.sql", sql)])).is_empty());
    }
    for sql in [
        "alter table saga add column orchestrator text not null default '';",
        "alter table saga add column orchestrator text; -- drop column",
        "create table fence (id uuid primary key, step text not null);",
        "create index by_step on fence (step);",
        "create or replace function f() returns void language sql as $$ drop table x; $$;",
        "create table note (id int); alter table note add constraint note_once unique (id);",
        "do $$ begin alter table saga add column name text; end $$;",
        "alter table saga drop constraint saga_is_woken; alter table saga add constraint saga_is_woken check (true) not valid;",
    ] {
        let found = expand::only(&Tree::of(&[("migrations/messaging/V8__next.sql", sql)]));
        assert!(found.is_empty(), "{sql}: {found:?}");
    }
}

#[test]
fn a_transaction_without_a_bound_is_found() {
    let begins = |path: &str, text: &str| bounds::only_one_place_begins(&Tree::of(&[(path, text)]));
    one(&begins("order-svc/src/orders.rs", "async fn f() { let tx = self.pool.begin().await?; }"), "has a bound");
    one(&begins("outbox-relay/src/retry.rs", "let pool = PgPoolOptions::new();"), "has a bound");
    for text in ["let mut savepoint = tx.begin().await?;", "// pool.begin()", "Transaction::begin(&pool, BOUND)"] {
        assert!(begins("order-svc/src/orders.rs", text).is_empty(), "{text}");
    }
    assert!(begins("saga-core/src/transaction.rs", "pool.begin_with(SQL)").is_empty());
}

#[test]
fn a_name_that_does_not_say_whose_transaction_it_is_is_found() {
    let found = |text: &str| bounds::names_say_whose_transaction(&Tree::of(&[("order-svc/src/store.rs", text)]));
    for (text, name) in [
        ("pub async fn save(tx: &mut Tx<'_>, order: &Order) -> Result<(), E> {}", "`save` takes its"),
        (
            "impl A {\n    fn save<F: Fn(u8)>(\n        &self,\n        tx: &'a mut outbox::Tx<'_>,\n    ) {}\n}",
            "`save` takes",
        ),
        ("fn save_in(pool: &PgPool) {}", "`save_in` takes no"),
        ("fn once_in(work: impl FnOnce(&mut Tx<'_>) -> u8) {}", "`once_in` takes no"),
        ("impl Handle for A {\n    fn handle(tx: &mut Tx<'_>) {}\n}\nfn save(tx: &mut Transaction) {}", "`save` takes"),
    ] {
        one(&found(text), name);
    }
    for fine in [
        "fn save_in(&self, tx: &mut Tx<'_>) {}",
        "fn commit(tx: Tx<'static>) {}",
        "pub trait Handle {\n    fn handle(&self, tx: &mut Tx<'_>);\n}",
        "impl<C>\n    Handle for A<C>\n{\n    fn handle(&self, tx: &mut Tx<'_>) {}\n}",
    ] {
        assert!(found(fine).is_empty(), "{fine}");
    }
}

#[test]
fn an_edge_that_is_no_test_is_found() {
    let tree = Tree::of(&[("e2e/tests/x.rs", "#[test]\nfn it_holds() {}")]);
    assert!(files::edges(&tree, "# topics\n3 it_holds\n").is_empty());
    one(&files::edges(&tree, "3 it_fell\n"), "it_fell");
    one(&files::edges(&tree, "it_holds\n"), "not a topic");
}
