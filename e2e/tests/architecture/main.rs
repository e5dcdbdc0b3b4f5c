//! The architecture, as a test: which arrows exist between crates and modules, and which do not.
//!
//! The checks read `cargo metadata` and the source's text. Each is a function from what it reads to the violations that
//! it found. So a test can give it a violation and see it found.

mod arrows;
mod bounds;
mod docs;
mod expand;
mod files;
mod order;
mod picture;
mod purity;
mod seeded;
mod source;
mod words;

use source::Tree;

/// A difference between the source and the architecture, in words.
pub(crate) type Violation = String;

fn none(violations: &[Violation]) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

#[test]
fn crates_depend_on_each_other_only_where_an_arrow_is_drawn() {
    none(&arrows::check(&arrows::of_this_workspace()));
}

#[test]
fn modules_use_only_what_is_read_before_them() {
    let tree = Tree::of_this_workspace();
    none(&order::saga_core(&tree));
    none(&order::circles(&tree));
}

/// `make picture` draws them again.
#[test]
fn the_pictures_of_the_modules_are_those_of_the_sources() {
    let tree = Tree::of_this_workspace();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/modules");
    for package in picture::CRATES {
        let (file, drawn) = (folder.join(format!("{package}.svg")), picture::of(&order::modules(&tree, package)));
        if std::env::var_os("DRAW").is_some() {
            std::fs::write(&file, &drawn).expect("the picture can be written");
        }
        let kept = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(kept == drawn, "{package} has other modules than its picture shows: make picture");
    }
}

#[test]
fn the_core_the_contracts_and_every_domain_reach_no_io() {
    none(&purity::no_io(&Tree::of_this_workspace()));
}

#[test]
fn one_file_knows_backoff_and_one_file_reads_the_clock() {
    let tree = Tree::of_this_workspace();
    none(&purity::backoff(&tree));
    none(&purity::clock(&tree));
}

#[test]
fn the_engine_knows_no_orders() {
    none(&purity::engine_knows_no_orders(&Tree::of_this_workspace()));
}

#[test]
fn every_migration_is_embedded() {
    none(&files::migrations(&Tree::of_this_workspace()));
}

#[test]
fn the_list_of_edges_names_tests() {
    none(&files::edges(&Tree::of_this_workspace(), include_str!("../../edges.txt")));
}

#[test]
fn a_transaction_begins_with_a_bound_or_not_at_all() {
    none(&bounds::only_one_place_begins(&Tree::of_this_workspace()));
}

#[test]
fn a_name_says_whether_a_function_works_in_its_callers_transaction() {
    none(&bounds::names_say_whose_transaction(&Tree::of_this_workspace()));
}

#[test]
fn no_migration_of_this_release_keeps_an_older_build_from_writing() {
    none(&expand::only(&Tree::of_this_workspace()));
}

#[test]
fn programs_and_comments_speak_of_components_as_of_components() {
    let tree = Tree::of_this_workspace();
    none(&words::of_programs(&tree));
    none(&words::of_comments(&tree));
}

#[test]
fn documents_link_to_what_is_there_show_its_code_and_have_short_sentences() {
    let tree = Tree::of_this_workspace();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    none(&docs::links(&tree, |path| root.join(path).exists()));
    none(&docs::summary(&tree));
    none(&docs::language(&tree));
    none(&docs::code(&tree));
}

#[test]
fn mains_are_short_and_files_are_read_in_one_sitting() {
    let tree = Tree::of_this_workspace();
    none(&files::mains(&tree));
    none(&files::lengths(&tree));
    none(&files::module_docs(&tree));
    none(&files::examples(&tree));
    none(&files::module_files(&tree));
    none(&files::constants(&tree));
}
