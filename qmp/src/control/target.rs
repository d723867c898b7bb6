//! [`Target`]: the daemon that a command is for, as an argument.

use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::client::address::Address;
use crate::client::connection::Client;
use crate::client::error::ClientError;

/// Longest patience that can be asked for, in seconds.
const SECONDS_MAX: f64 = 86_400.0;

/// Which daemon, and how long it may take to answer at all.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// The daemon's QMP socket: its path, or HOST:PORT
    #[arg(value_name = "SOCKET", value_parser = OsStringValueParser::new().map(Address::from))]
    pub socket: Address,
    /// Wait this long for the daemon's greeting; commands may take as long as they need
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub timeout: Duration,
}

impl Target {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody there, nobody who speaks, or somebody who speaks something else.
    pub async fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.socket, self.timeout, None).await
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= SECONDS_MAX => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err(format!(
            "seconds above 0 and up to {SECONDS_MAX} are expected"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "inf", "nan", "1e9", "", "5s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
