//! Card numbers, which no service may store. Pure.
//!
//! A payment is made by the gateway's token. A card's own number in a field would be stored for ever, in tables, topics
//! and logs. So each text that a person writes, and that might hold one, is refused before it is used.
//!
//! ```
//! use saga_core::card::holds_a_card_number;
//!
//! assert!(holds_a_card_number("ship it, my card is 4242 4242 4242 4242"));
//! assert!(!holds_a_card_number("tok_4242424242424242"), "the name of a token");
//! ```

use std::ops::RangeInclusive;

/// How many digits a card number has.
const DIGITS: RangeInclusive<usize> = 13..=19;

/// The most digits that people write in one group, where they write groups (`3782 822463 10005`). The limit keeps a
/// UUID from being one.
const GROUP_MAX: usize = 7;

/// What people write between the groups; `_` as well, where digits stand on both sides or nothing.
const SEPARATORS: [char; 5] = [' ', '-', '.', '/', ','];

/// What is wrong with such a text: completes a sentence that begins with the field, and repeats nothing of it.
pub const REFUSED: &str = "holds what looks like a card number, which is not kept here";

/// Whether `text` holds what looks like a card number: 13 to 19 digits, in one group or with separators between. The
/// digits begin as the networks' cards do, and their check digit is right (Luhn). Digits that a letter or `+` touches,
/// directly or with `_` between, do not count. They are part of a name, such as a token's, or of a telephone number.
#[must_use]
pub fn holds_a_card_number(text: &str) -> bool {
    text.split(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '+') || SEPARATORS.contains(&c))).any(|piece| {
        let groups: Vec<Option<Vec<u32>>> =
            piece.split(SEPARATORS).flat_map(groups).filter(|group| !group.is_empty()).map(digits).collect();
        groups.split(Option::is_none).any(|run| {
            let run: Vec<&[u32]> = run.iter().flatten().map(Vec::as_slice).collect();
            run.iter().any(|group| is_a_card_number(group)) || is_grouped(&run)
        })
    })
}

/// The groups of a word: one, unless it is nothing but digits and `_`.
fn groups(word: &str) -> Vec<&str> {
    match word.chars().all(|c| c == '_' || c.is_ascii_digit()) {
        true => word.split('_').collect(),
        false => vec![word],
    }
}

/// A group that consists of digits.
fn digits(group: &str) -> Option<Vec<u32>> {
    group.chars().map(|c| c.to_digit(10)).collect()
}

/// Whether some neighbouring short groups form one card number.
fn is_grouped(run: &[&[u32]]) -> bool {
    (0..run.len()).any(|first| {
        let mut number = Vec::new();
        run[first..].iter().take_while(|group| group.len() <= GROUP_MAX).take(*DIGITS.end()).any(|group| {
            number.extend_from_slice(group);
            is_a_card_number(&number)
        })
    })
}

fn is_a_card_number(digits: &[u32]) -> bool {
    DIGITS.contains(&digits.len()) && is_of_a_network(digits) && has_check_digit(digits)
}

/// Whether the digits begin as the networks' cards do: with 2221 to 2720, or with 3, 4, 5 or 6.
fn is_of_a_network(digits: &[u32]) -> bool {
    let first_four = digits.iter().take(4).fold(0, |number, digit| number * 10 + digit);
    matches!(first_four, 2_221..=2_720 | 3_000..=6_999)
}

/// Whether the last digit is right by Luhn's rule.
fn has_check_digit(digits: &[u32]) -> bool {
    let weighed = digits.iter().rev().enumerate().map(|(place, digit)| match place % 2 {
        0 => *digit,
        _ => digit * 2 / 10 + digit * 2 % 10,
    });
    weighed.sum::<u32>() % 10 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_networks_test_cards_are_found_however_they_are_written() {
        for card in [
            "4111111111111111",
            "4111 1111 1111 1111",
            "4111-1111-1111-1111",
            "4111.1111.1111.1111",
            "4111/1111/1111/1111",
            "4111,1111,1111,1111",
            "4111, 1111, 1111, 1111",
            "4111_1111_1111_1111",
            "4111_1111 1111/1111",
            "_4111111111111111_",
            " 4111 1111 1111 1111 ",
            "4222222222222",
            "5555555555554444",
            "2223003122003222",
            "378282246310005",
            "3782 822463 10005",
            "30569309025904",
            "6011111111111117",
            "3530111333300000",
            "6304000000000000000",
            "4111111111111111 12/28 123",
            "card:4111111111111111;cvc:123",
            "number=4111 1111 1111 1111",
            "{\"pan\":\"4111111111111111\"}",
        ] {
            assert!(holds_a_card_number(card), "{card}");
        }
    }

    #[test]
    fn tokens_ids_and_numbers_of_other_kinds_are_none() {
        for other in [
            "",
            "tok_visa",
            "tok_4111111111111111",
            "tok_4111_1111_1111_1111",
            "pm_12_4111111111111111",
            "4111111111111111_tok",
            "d0c4111111111111111f",
            "+4222222222222",
            "pm_1MqLiJLkdIwHu7ixUEgbFdYF",
            "auth0|5f7c8ec7c33c6c004bbafe82",
            "customer-17",
            "4111111111111112",
            "1234567890123452",
            "411111111111",
            "41111111111111111111",
            "550e8400-e29b-41d4-a716-446655440000",
            "41111111-1111-1111-a716-446655440000",
            "0190f5e0-7d1b-7c3e-8000-000000000000",
            "1732900000000",
            "4111 1111 1111",
        ] {
            assert!(!holds_a_card_number(other), "{other}");
        }
    }
}
