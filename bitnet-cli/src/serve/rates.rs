//! Rate limits: how much a client may ask in a minute.

use std::{num::NonZeroU32, time::Duration};

use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};

/// Wrong keys that an address may try in a minute.
const WRONG_KEYS: NonZeroU32 = NonZeroU32::new(30).unwrap();

/// Limits; a client is a key, or an address where there are no keys.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Rates")]
pub struct RateArgs {
    /// Requests a minute of each key, or of each address where there are no keys
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,
    /// Tokens a minute of each key or address: those of prompts, and as many new ones as a request may get
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<NonZeroU32>,
    /// Requests a minute of each address, whatever its keys
    #[arg(long, value_name = "N")]
    address_requests_per_minute: Option<NonZeroU32>,
}

type Limiter = DefaultKeyedRateLimiter<String>;

/// What clients have used up.
pub struct Rates {
    requests: Option<Limiter>,
    tokens: Option<(Limiter, NonZeroU32)>,
    addresses: Option<Limiter>,
    wrong_keys: Limiter,
    clock: DefaultClock,
}

/// Why a client has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    /// It may ask again after so long.
    For(Duration),
    /// It asks for more tokens than it gets in a minute.
    Always(NonZeroU32),
}

impl Rates {
    /// Nothing used up.
    pub fn new(args: RateArgs) -> Self {
        let limiter = |quota| RateLimiter::keyed(Quota::per_minute(quota));
        Self {
            requests: args.requests_per_minute.map(limiter),
            tokens: args.tokens_per_minute.map(|quota| (limiter(quota), quota)),
            addresses: args.address_requests_per_minute.map(limiter),
            wrong_keys: limiter(WRONG_KEYS),
            clock: DefaultClock::default(),
        }
    }

    /// A client asks.
    pub fn request(&self, client: &str) -> Result<(), Exceeded> {
        self.requests.as_ref().map_or(Ok(()), |limiter| self.one(limiter, client))
    }

    /// Someone asks from an address.
    pub fn address(&self, address: &str) -> Result<(), Exceeded> {
        self.addresses.as_ref().map_or(Ok(()), |limiter| self.one(limiter, address))
    }

    /// A key was wrong.
    pub fn wrong_key(&self, address: &str) -> Result<(), Exceeded> {
        self.one(&self.wrong_keys, address)
    }

    /// A client asks for tokens.
    pub fn tokens(&self, client: &str, count: usize) -> Result<(), Exceeded> {
        let Some((limiter, quota)) = &self.tokens else { return Ok(()) };
        let Some(count) = NonZeroU32::new(u32::try_from(count).unwrap_or(u32::MAX)) else {
            return Ok(());
        };
        match limiter.check_key_n(&client.to_owned(), count) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(Exceeded::For(until.wait_time_from(self.clock.now()))),
            Err(_) => Err(Exceeded::Always(*quota)),
        }
    }

    /// Forgets clients who have their full rate again.
    pub fn forget(&self) {
        let tokens = self.tokens.as_ref().map(|(limiter, _)| limiter);
        let all = [self.requests.as_ref(), tokens, self.addresses.as_ref(), Some(&self.wrong_keys)];
        for limiter in all.into_iter().flatten() {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }

    fn one(&self, limiter: &Limiter, client: &str) -> Result<(), Exceeded> {
        let checked = limiter.check_key(&client.to_owned());
        checked.map_err(|until| Exceeded::For(until.wait_time_from(self.clock.now())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_have_rates_of_their_own() {
        let two = NonZeroU32::new(2);
        let args =
            RateArgs { requests_per_minute: two, tokens_per_minute: two, ..RateArgs::default() };
        let rates = Rates::new(args);
        let waits =
            |outcome| matches!(outcome, Err(Exceeded::For(wait)) if wait > Duration::from_secs(20));
        assert_eq!((rates.request("a"), rates.request("a")), (Ok(()), Ok(())));
        assert!(waits(rates.request("a")));
        assert_eq!(rates.request("b"), Ok(()));
        assert_eq!((rates.tokens("a", 0), rates.tokens("a", 2)), (Ok(()), Ok(())));
        assert!(waits(rates.tokens("a", 1)));
        assert_eq!(rates.tokens("b", 3), Err(Exceeded::Always(two.unwrap())));
        assert_eq!(rates.address("a"), Ok(()));
        rates.forget();
        assert!(waits(rates.request("a")));
    }
}
