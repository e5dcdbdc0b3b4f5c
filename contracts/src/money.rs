//! Money: integer minor units with an ISO 4217 currency. No floats anywhere.

use serde::{Deserialize, Deserializer, Serialize};
use std::{fmt, str::FromStr};

// Money is part of messages, which are read tolerantly: a field that a later version adds is ignored. Requests of
// people are read [`strictly`].
/// An amount in minor units (cents) of a currency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Money {
    /// Minor units, for example cents.
    #[schema(example = 1999)]
    pub amount: i64,
    /// ISO 4217 code.
    #[schema(value_type = String, example = "EUR")]
    pub currency: Currency,
}

impl Money {
    /// Adds; `None` when the currencies differ or the sum overflows.
    #[must_use]
    pub fn checked_add(self, other: Self) -> Option<Self> {
        (self.currency == other.currency)
            .then(|| self.amount.checked_add(other.amount))
            .flatten()
            .map(|amount| Self { amount, ..self })
    }

    /// Multiplies; `None` on overflow.
    #[must_use]
    pub fn checked_mul(self, factor: i64) -> Option<Self> {
        self.amount.checked_mul(factor).map(|amount| Self { amount, ..self })
    }
}

/// For `#[serde(deserialize_with)]` in requests of people: a field that [`Money`] does not have is refused.
///
/// # Errors
/// The same as for any other malformed money.
pub fn strictly<'de, D: Deserializer<'de>>(from: D) -> Result<Money, D::Error> {
    Strict::deserialize(from).map(|Strict { amount, currency }| Money { amount, currency })
}

/// [`strictly`] for money that may be `null`. It also needs `#[serde(default)]` where it may be left out.
///
/// # Errors
/// The same as for [`strictly`].
pub fn strictly_if_any<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Money>, D::Error> {
    let strict = Option::<Strict>::deserialize(from)?;
    Ok(strict.map(|Strict { amount, currency }| Money { amount, currency }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Strict {
    amount: i64,
    #[serde(deserialize_with = "active")]
    currency: Currency,
}

fn active<'de, D: Deserializer<'de>>(from: D) -> Result<Currency, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}

/// An ISO 4217 currency code. What people ask for is parsed ([`FromStr`]) and has to be an active code. What is stored
/// or sent between services ([`Currency::stored`], `Deserialize`) is any three capital letters: ISO withdraws codes, and
/// money of such a currency is still to be read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Currency([u8; 3]);

/// The active codes of ISO 4217 that name money for payments.
const CODES: &str = "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD \
    CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD \
    HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD \
    MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR \
    RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS \
    UAH UGX USD UYU UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG";

/// A text that is no active ISO 4217 code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an ISO 4217 currency code such as \"EUR\"")]
pub struct UnknownCurrency(String);

impl Currency {
    /// The code of a row or a message, active or not.
    ///
    /// # Errors
    /// The text is not three capital letters.
    pub fn stored(text: &str) -> Result<Self, UnknownCurrency> {
        match <[u8; 3]>::try_from(text.as_bytes()) {
            Ok(code) if code.iter().all(u8::is_ascii_uppercase) => Ok(Self(code)),
            _ => Err(UnknownCurrency(text.chars().take(20).collect())),
        }
    }

    /// The code's three letters.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("???")
    }
}

impl FromStr for Currency {
    type Err = UnknownCurrency;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let code = Self::stored(text)?;
        match CODES.split_ascii_whitespace().any(|known| known == text) {
            true => Ok(code),
            false => Err(UnknownCurrency(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Currency {
    type Error = UnknownCurrency;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::stored(&text)
    }
}

impl From<Currency> for String {
    fn from(currency: Currency) -> Self {
        currency.as_str().to_owned()
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_currency_is_an_active_iso_4217_code_and_nothing_else() {
        assert_eq!("EUR".parse::<Currency>().unwrap().as_str(), "EUR");
        for wrong in ["eur", "EURO", "", "XXX", "ЕВР", "AA A"] {
            assert!(wrong.parse::<Currency>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_withdrawn_currency_is_refused_of_people_and_still_read() {
        let money = r#"{"amount":1,"currency":"BGN"}"#;
        assert_eq!(serde_json::from_str::<Money>(money).unwrap().currency, Currency::stored("BGN").unwrap());
        assert!(strictly(&mut serde_json::Deserializer::from_str(money)).is_err());
        for wrong in ["eur", "EURO", "", "ЕВР", "AA A", "A1B"] {
            assert!(Currency::stored(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_field_too_many_is_ignored_in_a_message_and_refused_in_a_request() {
        #[derive(Debug, Deserialize)]
        struct Request {
            #[serde(deserialize_with = "strictly")]
            price: Money,
            #[serde(default, deserialize_with = "strictly_if_any")]
            discount: Option<Money>,
        }
        let (good, more) = (r#"{"amount":1,"currency":"EUR"}"#, r#"{"amount":1,"currency":"EUR","digits":2}"#);
        let euro = Money { amount: 1, currency: "EUR".parse().unwrap() };
        assert_eq!(serde_json::from_str::<Money>(more).unwrap(), euro);
        let request =
            |price: &str, discount: &str| serde_json::from_str::<Request>(&format!(r#"{{"price":{price}{discount}}}"#));
        let read = request(good, "").unwrap();
        assert_eq!((read.price, read.discount), (euro, None));
        assert_eq!(request(good, &format!(r#","discount":{good}"#)).unwrap().discount, Some(euro));
        assert!(request(good, r#","discount":null"#).is_ok());
        for wrong in [request(more, ""), request(good, &format!(r#","discount":{more}"#))] {
            assert!(wrong.unwrap_err().to_string().contains("unknown field `digits`"));
        }
    }

    #[test]
    fn sums_of_different_currencies_and_overflows_are_refused() {
        let eur = Money { amount: i64::MAX, currency: "EUR".parse().unwrap() };
        let usd = Money { amount: 1, currency: "USD".parse().unwrap() };
        assert_eq!(eur.checked_add(usd), None);
        assert_eq!(eur.checked_add(Money { amount: 1, ..eur }), None);
        assert_eq!(eur.checked_mul(2), None);
        assert_eq!(usd.checked_mul(3).unwrap().amount, 3);
    }
}
