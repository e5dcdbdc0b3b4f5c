//! Places where a test may inject a fault.

/// `fail_point!("consumer.before-commit", &self.group)`: the name of the edge, and the scope that distinguishes
/// instances. A third argument, an iterator of `&SagaHeaders`, lists the steps that pass it. The macro returns from the
/// function with `Err(Injected.into())` when a test armed it (`testkit::failpoints`, which also lists all names).
/// Without the `testkit` feature it does nothing.
#[allow(unused_macros, reason = "used from wherever a transaction has an edge")]
macro_rules! fail_point {
    ($name:literal, $scope:expr) => {
        #[cfg(feature = "testkit")]
        $crate::testkit::failpoints::pass($name, $scope)?;
    };
    ($name:literal, $scope:expr, $sagas:expr) => {
        #[cfg(feature = "testkit")]
        $crate::testkit::failpoints::pass_with($name, $scope, $sagas)?;
    };
}

#[allow(unused_imports, reason = "used from wherever a transaction has an edge")]
pub(crate) use fail_point;
