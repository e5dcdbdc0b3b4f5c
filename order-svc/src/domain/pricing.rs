//! The price of an order: the catalogue's prices times its quantities, in one currency, without overflow.

use super::{BadField, Fault, NewOrder};
use contracts::{
    money::Money,
    product::{Quantity, Sku},
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// The pieces of one product, at the price of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PricedLine {
    /// The product's stock-keeping unit.
    pub sku: Sku,
    /// The number of pieces.
    pub quantity: Quantity,
    /// The price of one piece.
    pub unit_price: Money,
}

/// The most that one order may cost, in minor units: the largest whole number that every JSON reader keeps exact.
pub const MAX_TOTAL: i64 = 9_007_199_254_740_991;

/// Prices `order` from `catalogue`, or lists for each line why it cannot be sold.
pub fn price(order: &NewOrder, catalogue: &HashMap<Sku, Money>) -> Result<(Vec<PricedLine>, Money), Vec<BadField>> {
    let mut bad = Vec::new();
    let mut lines = Vec::with_capacity(order.lines.len());
    for (i, line) in order.lines.iter().enumerate() {
        match catalogue.get(&line.sku) {
            None => bad.push(BadField::new(format!("items[{i}].sku"), Fault::UnknownProduct)),
            Some(&unit_price) => {
                lines.push((i, PricedLine { sku: line.sku.clone(), quantity: line.quantity, unit_price }));
            }
        }
    }
    if let Some(currency) = lines.first().map(|(_, line)| line.unit_price.currency) {
        for (i, line) in lines.iter().filter(|(_, line)| line.unit_price.currency != currency) {
            let other = line.unit_price.currency;
            bad.push(BadField::new(
                format!("items[{i}].sku"),
                Fault::OtherCurrency { currency: other, first: currency },
            ));
        }
    }
    if !bad.is_empty() {
        return Err(bad);
    }
    let lines: Vec<_> = lines.into_iter().map(|(_, line)| line).collect();
    match total(&lines) {
        Some(total) if total.amount == 0 => Err(vec![BadField::new("items", Fault::NothingToPay)]),
        Some(total) => Ok((lines, total)),
        None => Err(vec![BadField::new("items", Fault::TotalTooLarge)]),
    }
}

/// The sum of all lines; `None` when there is none, currencies differ, or it exceeds [`MAX_TOTAL`].
pub fn total(lines: &[PricedLine]) -> Option<Money> {
    lines
        .iter()
        .map(|line| line.unit_price.checked_mul(line.quantity.get()))
        .reduce(|sum, line| sum?.checked_add(line?))
        .flatten()
        .filter(|total| (0..=MAX_TOTAL).contains(&total.amount))
}

#[cfg(test)]
mod tests {
    use super::*;
    use contracts::product::Line;
    use proptest::prelude::*;

    fn money(amount: i64, currency: &str) -> Money {
        Money { amount, currency: currency.parse().unwrap() }
    }

    fn order(lines: &[(&str, i64)]) -> NewOrder {
        NewOrder {
            customer: "c-1".parse().unwrap(),
            payment_method: "tok".parse().unwrap(),
            lines: lines
                .iter()
                .map(|(sku, n)| Line { sku: sku.parse().unwrap(), quantity: Quantity::try_from(*n).unwrap() })
                .collect(),
        }
    }

    fn catalogue(prices: &[(&str, Money)]) -> HashMap<Sku, Money> {
        prices.iter().map(|(sku, price)| (sku.parse().unwrap(), *price)).collect()
    }

    #[test]
    fn the_total_is_price_times_quantity_over_all_lines() {
        let prices = catalogue(&[("A", money(250, "EUR")), ("B", money(1, "EUR"))]);
        let (lines, total) = price(&order(&[("A", 2), ("B", 3)]), &prices).unwrap();
        assert_eq!(total, money(503, "EUR"));
        assert_eq!(lines[1].unit_price, money(1, "EUR"));
    }

    #[test]
    fn every_unknown_product_and_every_other_currency_is_named_at_once() {
        let prices = catalogue(&[("A", money(1, "EUR")), ("C", money(1, "USD"))]);
        let bad = price(&order(&[("A", 1), ("B", 1), ("C", 1)]), &prices).unwrap_err();
        let fields: Vec<_> = bad.iter().map(|bad| bad.field.as_str()).collect();
        assert_eq!(fields, ["items[1].sku", "items[2].sku"]);
        assert!(matches!(bad[1].fault, Fault::OtherCurrency { .. }));
    }

    #[test]
    fn a_total_that_does_not_fit_or_is_zero_is_refused() {
        let prices =
            catalogue(&[("A", money(i64::MAX, "EUR")), ("B", money(MAX_TOTAL, "EUR")), ("C", money(0, "EUR"))]);
        for lines in [&[("A", 2)][..], &[("A", 1)], &[("B", 1), ("B", 1)], &[("B", 1_000_000)]] {
            let bad = price(&order(lines), &prices).unwrap_err();
            assert_eq!(bad, [BadField::new("items", Fault::TotalTooLarge)]);
        }
        assert_eq!(price(&order(&[("B", 1)]), &prices).unwrap().1.amount, MAX_TOTAL);
        let bad = price(&order(&[("C", 5)]), &prices).unwrap_err();
        assert_eq!(bad, [BadField::new("items", Fault::NothingToPay)]);
    }

    proptest! {
        #[test]
        fn the_total_is_exact_or_there_is_none(lines in prop::collection::vec((0i64.., 1i64..=Quantity::MAX), 1..20)) {
            let exact: i128 = lines.iter().map(|(price, n)| i128::from(*price) * i128::from(*n)).sum();
            let lines: Vec<_> = lines
                .into_iter()
                .map(|(amount, n)| PricedLine {
                    sku: "A".parse().unwrap(),
                    quantity: Quantity::try_from(n).unwrap(),
                    unit_price: money(amount, "EUR"),
                })
                .collect();
            let expected = (exact <= i128::from(MAX_TOTAL)).then_some(exact);
            prop_assert_eq!(total(&lines).map(|total| i128::from(total.amount)), expected);
        }
    }
}
