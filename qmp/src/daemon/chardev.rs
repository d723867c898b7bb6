//! Chardevs as QEMU describes them: a socket that listens or connects, standard input and output, or nothing.

use std::collections::HashMap;
use std::time::Duration;

use blockyard_engine::sockets::Address;

use crate::error::QmpError;
use crate::keyval;

/// A chardev's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chardev {
    /// Its id.
    pub id: String,
    /// What it is.
    pub backend: Backend,
}

/// What a chardev is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Standard input and output.
    Stdio,
    /// Nobody ever connects.
    Null,
    /// A socket.
    Socket {
        /// Where.
        address: Address,
        /// Which side of it.
        role: Role,
    },
}

/// Which side of a connection a socket chardev is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Clients come here; `wait`: starting up goes on only when the first has.
    Server {
        /// Wait for the first client.
        wait: bool,
    },
    /// Connects to where a client listens.
    Client {
        /// How long after a failure or a loss it tries again; `None`: it does not.
        reconnect: Option<Duration>,
    },
}

const STDIO_PARAMETERS: &[&str] = &["signal", "logfile", "logappend", "mux"];
const SOCKET_PARAMETERS: &[&str] = &[
    "path",
    "host",
    "port",
    "fd",
    "localaddr",
    "localport",
    "to",
    "ipv4",
    "ipv6",
    "nodelay",
    "delay",
    "server",
    "wait",
    "telnet",
    "tn3270",
    "reconnect",
    "reconnect-ms",
    "tls-creds",
    "tls-authz",
    "websocket",
    "abstract",
    "tight",
    "mux",
    "logfile",
    "logappend",
    "signal",
];

/// Parameters that are switches, whether or not they mean something here.
const SWITCHES: &[&str] = &[
    "signal",
    "logappend",
    "mux",
    "ipv4",
    "ipv6",
    "nodelay",
    "delay",
    "server",
    "wait",
    "telnet",
    "tn3270",
    "websocket",
    "abstract",
    "tight",
];

/// Reads a chardev's option.
///
/// # Errors
/// In QEMU's words where it has some.
pub fn parse(text: &str) -> Result<Chardev, QmpError> {
    let mut parameters = Parameters::split(text)?;
    let Some(id) = parameters.take("id") else {
        return Err(QmpError::generic("chardev: no id specified"));
    };
    if !is_identifier(&id) {
        return Err(QmpError::generic("Parameter 'id' expects an identifier"));
    }
    let Some(backend) = parameters.take("backend") else {
        return Err(QmpError::generic(format!(
            "chardev: \"{id}\" missing backend"
        )));
    };
    parameters.check_switches()?;
    let backend = match backend.as_str() {
        "stdio" => {
            parameters.only(STDIO_PARAMETERS)?;
            Backend::Stdio
        }
        "null" => {
            parameters.only(STDIO_PARAMETERS)?;
            Backend::Null
        }
        "socket" => {
            parameters.only(SOCKET_PARAMETERS)?;
            socket(parameters)?
        }
        "file" | "pipe" | "pty" | "ringbuf" | "udp" | "mux" | "hub" | "serial" | "parallel" => {
            return Err(QmpError::generic(format!(
                "'{backend}' is not supported here: QMP is served on 'socket' and 'stdio'"
            )));
        }
        _ => {
            let text = format!("'{backend}' is not a valid char driver name");
            return Err(QmpError::generic(text));
        }
    };
    Ok(Chardev { id, backend })
}

fn socket(mut parameters: Parameters) -> Result<Backend, QmpError> {
    for unsupported in ["telnet", "tn3270", "websocket"] {
        if parameters.flag(unsupported)?.unwrap_or(false) {
            return Err(QmpError::generic(format!(
                "'{unsupported}' is not supported here"
            )));
        }
    }
    for unsupported in ["tls-creds", "tls-authz", "localaddr", "localport"] {
        if parameters.take(unsupported).is_some() {
            return Err(QmpError::generic(format!(
                "'{unsupported}' is not supported here"
            )));
        }
    }
    let server = parameters.flag("server")?.unwrap_or(false);
    let wait = parameters.flag("wait")?;
    let reconnect = reconnect(&mut parameters)?;
    let address = address(&mut parameters)?;
    let role = if server {
        if reconnect.is_some() {
            let text = "'reconnect' option is incompatible with socket in server listen mode";
            return Err(QmpError::generic(text));
        }
        Role::Server {
            wait: wait.unwrap_or(true),
        }
    } else {
        if wait.is_some() {
            let text = "'wait' option is incompatible with socket in client connect mode";
            return Err(QmpError::generic(text));
        }
        if reconnect.is_some() && matches!(address, Address::Descriptor(_)) {
            return Err(QmpError::generic(
                "'reconnect' option is incompatible with 'fd'",
            ));
        }
        Role::Client { reconnect }
    };
    Ok(Backend::Socket { address, role })
}

fn reconnect(parameters: &mut Parameters) -> Result<Option<Duration>, QmpError> {
    let seconds = parameters.number("reconnect")?;
    let milliseconds = parameters.number("reconnect-ms")?;
    let pause = match (seconds, milliseconds) {
        (Some(_), Some(_)) => {
            let text = "'reconnect' and 'reconnect-ms' are mutually exclusive";
            return Err(QmpError::generic(text));
        }
        (Some(seconds), None) => Duration::from_secs(seconds),
        (None, Some(milliseconds)) => Duration::from_millis(milliseconds),
        (None, None) => Duration::ZERO,
    };
    Ok((!pause.is_zero()).then_some(pause))
}

fn address(parameters: &mut Parameters) -> Result<Address, QmpError> {
    let path = parameters.take("path");
    let host = parameters.take("host");
    let descriptor = parameters.take("fd");
    let port = parameters.take("port");
    match (path, host, descriptor) {
        (Some(name), None, None) if parameters.flag("abstract")?.unwrap_or(false) => {
            Ok(Address::Abstract {
                name,
                tight: parameters.flag("tight")?.unwrap_or(true),
            })
        }
        (Some(path), None, None) => Ok(Address::Path(path)),
        (None, Some(host), None) => {
            let Some(port) = port else {
                return Err(QmpError::generic("chardev: socket: no port given"));
            };
            let ipv4 = parameters.flag("ipv4")?;
            let ipv6 = parameters.flag("ipv6")?;
            let to = parameters.number("to")?;
            let port_last = to.map(u16::try_from).transpose();
            Ok(Address::Host {
                host,
                port,
                port_last: port_last
                    .map_err(|_| QmpError::generic("Parameter 'to' expects a port number"))?,
                // Naming one family excludes the other, unless that is named too.
                ipv4: ipv4.unwrap_or(ipv6 != Some(true)),
                ipv6: ipv6.unwrap_or(ipv4 != Some(true)),
            })
        }
        (None, None, Some(number)) => match number.parse() {
            Ok(number) => Ok(Address::Descriptor(number)),
            Err(_) => Err(QmpError::generic(format!(
                "Unable to parse FD number {number}"
            ))),
        },
        _ => {
            let text = "None or one of 'path', 'fd' or 'host' option required.";
            Err(QmpError::generic(text))
        }
    }
}

fn is_identifier(text: &str) -> bool {
    let mut characters = text.chars();
    let letter = characters
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic());
    letter && characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// The parameters of an option in QEMU's older form: flat, and switches may stand without a value.
struct Parameters(HashMap<String, String>);

impl Parameters {
    fn split(text: &str) -> Result<Self, QmpError> {
        let mut members = HashMap::new();
        for (index, part) in keyval::parts(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((key, value)) => members.insert(key.to_owned(), value.to_owned()),
                None if index == 0 => members.insert("backend".to_owned(), part),
                None => match part.strip_prefix("no") {
                    Some(key) if part != "nodelay" => {
                        members.insert(key.to_owned(), "off".to_owned())
                    }
                    _ => members.insert(part, "on".to_owned()),
                },
            };
        }
        Ok(Self(members))
    }

    fn only(&self, known: &[&str]) -> Result<(), QmpError> {
        match self.0.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(QmpError::generic(format!("Invalid parameter '{key}'"))),
        }
    }

    fn check_switches(&self) -> Result<(), QmpError> {
        let is_wrong = |name: &&&str| {
            let value = self.0.get(**name);
            value.is_some_and(|value| value != "on" && value != "off")
        };
        match SWITCHES.iter().find(is_wrong) {
            Some(name) => Err(not_a_switch(name)),
            None => Ok(()),
        }
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.take(name).as_deref() {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(_) => Err(not_a_switch(name)),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        let parsed = self.take(name).map(|text| text.parse());
        parsed
            .transpose()
            .map_err(|_| QmpError::generic(format!("Parameter '{name}' expects a number")))
    }
}

fn not_a_switch(name: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' expects 'on' or 'off'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(text: &str) -> Backend {
        parse(text).expect("accepted").backend
    }

    #[test]
    fn sockets_of_every_kind() {
        assert_eq!(
            backend("socket,id=a,path=x,server=on"),
            Backend::Socket {
                address: Address::Path("x".to_owned()),
                role: Role::Server { wait: true }
            }
        );
        assert_eq!(
            backend("socket,id=a,path=x,server,nowait"),
            Backend::Socket {
                address: Address::Path("x".to_owned()),
                role: Role::Server { wait: false }
            }
        );
        assert_eq!(
            backend("socket,id=a,path=x,abstract=on,tight=off,reconnect-ms=20"),
            Backend::Socket {
                address: Address::Abstract {
                    name: "x".to_owned(),
                    tight: false
                },
                role: Role::Client {
                    reconnect: Some(Duration::from_millis(20))
                }
            }
        );
        assert_eq!(
            backend("socket,id=a,host=h,port=7,to=9,ipv4=on,server=on,wait=off"),
            Backend::Socket {
                address: Address::Host {
                    host: "h".to_owned(),
                    port: "7".to_owned(),
                    port_last: Some(9),
                    ipv4: true,
                    ipv6: false
                },
                role: Role::Server { wait: false }
            }
        );
    }

    #[test]
    fn refusals_are_those_of_the_reference() {
        for (text, expected) in [
            ("socket,path=x", "chardev: no id specified"),
            ("nope,id=a", "'nope' is not a valid char driver name"),
            ("id=a", "chardev: \"a\" missing backend"),
            ("socket,id=a,path=x,foo=1", "Invalid parameter 'foo'"),
            (
                "socket,id=a,path=x,server=maybe",
                "Parameter 'server' expects 'on' or 'off'",
            ),
            ("socket,id=a,host=h", "chardev: socket: no port given"),
            ("socket,id=a,fd=nope", "Unable to parse FD number nope"),
            (
                "socket,id=a,path=x,host=h,port=1",
                "None or one of 'path', 'fd' or 'host' option required.",
            ),
            (
                "socket,id=a,path=x,wait=off",
                "'wait' option is incompatible with socket in client connect mode",
            ),
            (
                "socket,id=a,path=x,server=on,reconnect=1",
                "'reconnect' option is incompatible with socket in server listen mode",
            ),
        ] {
            assert_eq!(parse(text).expect_err("refused").text, expected, "{text}");
        }
    }
}
