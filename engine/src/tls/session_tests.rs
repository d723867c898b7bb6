//! Two sides against each other, with certificates that OpenSSL makes: who is believed, who is not, and that bytes arrive in whatever
//! pieces they travel.

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use crate::tls::credentials::{Credentials, Endpoint, X509Spec};
use crate::tls::session::{Fault, Session};

/// Certificates under the names that a test gives them.
struct Authority {
    folder: TempDir,
}

const SERVER: &str = "basicConstraints=CA:false\nkeyUsage=digitalSignature,keyEncipherment\n\
                      subjectAltName=DNS:localhost,IP:127.0.0.1\n";

/// Whether there is a tool to make certificates with.
fn has_openssl() -> bool {
    let found = Command::new("openssl").arg("version").output().is_ok();
    if !found {
        let text = "openssl is missing (Debian package: openssl)";
        assert!(std::env::var_os("CI").is_none(), "{text}");
        eprintln!("skipped: {text}");
    }
    found
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let authority = Self { folder };
        authority.authority("ca");
        authority.leaf("server", "/CN=localhost", "ca", SERVER, "-days 2");
        authority.leaf("client", "/O=Example/CN=laptop", "ca", SERVER, "-days 2");
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(self.folder.path())
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments}: {said}");
    }

    fn authority(&self, name: &str) {
        self.run(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}-key -out {name} -subj /CN={name} -days 2"
        ));
    }

    fn leaf(&self, name: &str, subject: &str, signer: &str, extensions: &str, dates: &str) {
        std::fs::write(self.path("extensions"), extensions).expect("written");
        self.run(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}-key -out request -subj {subject}"
        ));
        if let Some((from, until)) = dates.split_once("..") {
            let config = "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\n\
                          default_md=sha256\npolicy=p\nunique_subject=no\n[p]\ncommonName=supplied\n";
            for (file, content) in [("config", config), ("index", ""), ("serial", "77\n")] {
                std::fs::write(self.path(file), content).expect("written");
            }
            self.run(&format!(
                "ca -batch -notext -config config -in request -cert {signer} -keyfile {signer}-key \
                 -out {name} -extfile extensions -startdate {from} -enddate {until}"
            ));
        } else {
            self.run(&format!(
                "x509 -req -in request -CA {signer} -CAkey {signer}-key -CAcreateserial -out {name} \
                 -extfile extensions {dates}"
            ));
        }
    }

    /// A folder with these files under QEMU's names.
    fn folder(&self, name: &str, files: &[(&str, &str)]) -> String {
        let folder = self.path(name);
        std::fs::create_dir(&folder).expect("made");
        for (to, from) in files {
            std::fs::copy(self.path(from), folder.join(to)).expect("copied");
        }
        folder.to_str().expect("text").to_owned()
    }

    /// Credentials of one side with this certificate and this authority.
    fn load(&self, endpoint: Endpoint, own: Option<&str>, ca: &str) -> Result<Credentials, String> {
        self.load_with(endpoint, own, ca, |_| ())
    }

    fn load_with(
        &self,
        endpoint: Endpoint,
        own: Option<&str>,
        ca: &str,
        change: impl FnOnce(&mut X509Spec),
    ) -> Result<Credentials, String> {
        let side = endpoint.name();
        let key = own.map(|own| format!("{own}-key"));
        let names = [format!("{side}-cert.pem"), format!("{side}-key.pem")];
        let mut files = vec![("ca-cert.pem", ca)];
        if let (Some(own), Some(key)) = (own, &key) {
            files.extend([(names[0].as_str(), own), (names[1].as_str(), key.as_str())]);
        }
        let folder = tempfile::tempdir_in(self.folder.path()).expect("a folder");
        for (to, from) in files {
            std::fs::copy(self.path(from), folder.path().join(to)).expect("copied");
        }
        let mut spec = X509Spec {
            dir: folder.path().to_str().map(str::to_owned),
            endpoint,
            ..X509Spec::default()
        };
        change(&mut spec);
        Credentials::load(spec).map_err(|text| {
            let folder = folder.path().to_str().expect("text");
            text.replace(folder, "DIR")
        })
    }
}

/// Credentials of a client and a server that believe each other; `None`: there is no tool to make certificates with.
pub(crate) fn believed() -> Option<(Credentials, Credentials)> {
    if !has_openssl() {
        return None;
    }
    let all = Authority::new();
    let client = all.load(Endpoint::Client, Some("client"), "ca");
    let server = all.load(Endpoint::Server, Some("server"), "ca");
    Some((client.expect("good"), server.expect("good")))
}

/// A client and a server that believe each other; `None`: there is no tool to make certificates with.
pub(crate) fn acquainted() -> Option<(Session, Session)> {
    let (client, server) = believed()?;
    let mut wire = Wire::new(&client, &server, None);
    wire.shake_hands(1000).expect("both are good");
    Some((wire.client, wire.server))
}

/// Both sides and what is on its way to each.
struct Wire {
    client: Session,
    server: Session,
    to_client: Vec<u8>,
    to_server: Vec<u8>,
}

impl Wire {
    fn new(client: &Credentials, server: &Credentials, hostname: Option<&str>) -> Self {
        Self {
            client: Session::client(client.connect(hostname).expect("a client")),
            server: Session::server(server.accept().expect("a server")),
            to_client: Vec::new(),
            to_server: Vec::new(),
        }
    }

    /// Lets both get to know each other, `step` bytes at a time.
    fn shake_hands(&mut self, step: usize) -> Result<(), Fault> {
        for _ in 0..100_000 {
            self.client.output(&mut self.to_server)?;
            let said = deliver(&mut self.server, &mut self.to_server, step);
            self.server.output(&mut self.to_client)?;
            said?;
            deliver(&mut self.client, &mut self.to_client, step)?;
            let is_done = !self.client.is_handshaking() && !self.server.is_handshaking();
            if is_done && self.to_client.is_empty() && self.to_server.is_empty() {
                return Ok(());
            }
        }
        panic!("nobody says anything");
    }
}

/// Gives a side the next bytes, of which none may be plain.
fn deliver(side: &mut Session, wire: &mut Vec<u8>, step: usize) -> Result<(), Fault> {
    let given = step.min(wire.len());
    let received = side.receive(&wire[..given], &mut [0; 64])?;
    assert_eq!(received.plain, 0);
    wire.drain(..received.taken);
    Ok(())
}

fn outcome(
    client: &Credentials,
    server: &Credentials,
    hostname: Option<&str>,
) -> Result<Option<String>, String> {
    let mut wire = Wire::new(client, server, hostname);
    let shaken = wire.shake_hands(1000);
    shaken.map_err(|fault| fault.to_string())?;
    Ok(wire.server.peer_name())
}

#[test]
fn who_is_signed_by_whom_we_trust_and_called_right_is_believed() {
    if !has_openssl() {
        return;
    }
    let all = Authority::new();
    all.authority("other");
    all.leaf("foreign", "/CN=localhost", "other", SERVER, "-days 2");
    let server = all
        .load(Endpoint::Server, Some("server"), "ca")
        .expect("good");
    let client = all
        .load(Endpoint::Client, Some("client"), "ca")
        .expect("good");
    let name = Some("O=Example,CN=laptop".to_owned());
    for hostname in [Some("localhost"), Some("127.0.0.1"), None] {
        assert_eq!(outcome(&client, &server, hostname), Ok(name.clone()));
    }
    for hostname in ["remotehost", "127.0.0.2"] {
        let refused = outcome(&client, &server, Some(hostname)).expect_err("not called so");
        assert!(refused.contains("not valid for name"), "{refused}");
    }
    assert!(client.accept().is_err() && server.connect(None).is_err());
    assert!(client.connect(Some("not a name")).is_err());
    // Without a certificate, and with one that nobody has signed whom the server trusts.
    let nobody = all.load(Endpoint::Client, None, "ca").expect("good");
    let unchecked = |spec: &mut X509Spec| spec.sanity_check = false;
    let foreign = all.load_with(Endpoint::Client, Some("foreign"), "ca", unchecked);
    for client in [&nobody, &foreign.expect("unchecked")] {
        assert!(outcome(client, &server, None).is_err());
    }
    // A server that asks nobody.
    let lenient = |spec: &mut X509Spec| spec.verify_peer = false;
    let asks_nobody = all.load_with(Endpoint::Server, Some("server"), "ca", lenient);
    assert_eq!(
        outcome(&nobody, &asks_nobody.expect("good"), None),
        Ok(None)
    );
    // A client that trusts others, and one that trusts anybody.
    let trusts_others = all.load_with(Endpoint::Client, Some("client"), "other", unchecked);
    assert!(outcome(&trusts_others.expect("unchecked"), &server, None).is_err());
    let trusts_anybody = all.load_with(Endpoint::Client, Some("client"), "other", |spec| {
        spec.sanity_check = false;
        spec.verify_peer = false;
    });
    let trusts_anybody = trusts_anybody.expect("unchecked");
    assert_eq!(
        outcome(&trusts_anybody, &server, Some("remotehost")),
        Ok(name)
    );
}

#[test]
fn who_is_out_of_date_or_revoked_is_not_let_in() {
    if !has_openssl() {
        return;
    }
    let all = Authority::new();
    all.leaf(
        "expired",
        "/CN=localhost",
        "ca",
        SERVER,
        "20200101000000Z..20210101000000Z",
    );
    let server = all
        .load(Endpoint::Server, Some("server"), "ca")
        .expect("good");
    let expired = all.load_with(Endpoint::Client, Some("expired"), "ca", |spec| {
        spec.sanity_check = false;
    });
    let refused = outcome(&expired.expect("unchecked"), &server, None).expect_err("expired");
    assert!(refused.contains("expired"), "{refused}");
    let client = all
        .load(Endpoint::Client, Some("client"), "ca")
        .expect("good");
    std::fs::write(all.path("config"), "[ca]\ndefault_ca=d\n[d]\ndatabase=index\ndefault_md=sha256\ndefault_crl_days=2\ncrlnumber=number\n").expect("written");
    std::fs::write(all.path("index"), "").expect("written");
    std::fs::write(all.path("number"), "01\n").expect("written");
    all.run("ca -config config -revoke client -keyfile ca-key -cert ca");
    all.run("ca -config config -gencrl -keyfile ca-key -cert ca -out list");
    let files = [
        ("ca-cert.pem", "ca"),
        ("ca-crl.pem", "list"),
        ("server-cert.pem", "server"),
        ("server-key.pem", "server-key"),
    ];
    let strict = Credentials::load(X509Spec {
        dir: Some(all.folder("strict", &files)),
        endpoint: Endpoint::Server,
        ..X509Spec::default()
    });
    let strict = strict.expect("good");
    let refused = outcome(&client, &strict, None).expect_err("revoked");
    assert!(refused.contains("evoked"), "{refused}");
    std::fs::write(Path::new(&all.path("strict")).join("ca-crl.pem"), "garbage").expect("written");
    let broken = Credentials::load(strict.spec().clone()).expect_err("no list");
    assert!(broken.starts_with("Cannot load CRL '"), "{broken}");
}

#[test]
fn what_is_wrong_with_certificates_is_told_before_they_are_used() {
    if !has_openssl() {
        return;
    }
    let all = Authority::new();
    all.authority("other");
    let usage = "basicConstraints=CA:false\nkeyUsage=critical,digitalSignature\n";
    let purpose = "basicConstraints=CA:false\nextendedKeyUsage=critical,emailProtection\n";
    for (name, signer, extensions, dates) in [
        ("expired", "ca", SERVER, "20200101000000Z..20210101000000Z"),
        ("early", "ca", SERVER, "20400101000000Z..20410101000000Z"),
        ("foreign", "other", SERVER, "-days 2"),
        ("is-ca", "ca", "basicConstraints=CA:true\n", "-days 2"),
        ("usage", "ca", usage, "-days 2"),
        ("purpose", "ca", purpose, "-days 2"),
    ] {
        all.leaf(name, "/CN=localhost", signer, extensions, dates);
    }
    for garbage in ["garbage", "garbage-key"] {
        std::fs::write(all.path(garbage), "garbage").expect("written");
    }
    std::fs::copy(all.path("other-key"), all.path("mixed-key")).expect("copied");
    std::fs::copy(all.path("server"), all.path("mixed")).expect("copied");
    std::fs::copy(all.path("server"), all.path("no-key")).expect("copied");
    std::fs::copy(all.path("garbage"), all.path("no-key-key")).expect("copied");
    for endpoint in [Endpoint::Server, Endpoint::Client] {
        let side = endpoint.name();
        let pair =
            format!("Cannot load certificate 'DIR/{side}-cert.pem' & key 'DIR/{side}-key.pem':");
        for (own, ca, expected) in [
            (
                "expired",
                "ca",
                format!("The {side} certificate DIR/{side}-cert.pem has expired"),
            ),
            (
                "early",
                "ca",
                format!("The {side} certificate DIR/{side}-cert.pem is not yet active"),
            ),
            (
                "foreign",
                "ca",
                format!(
                    "Our own certificate DIR/{side}-cert.pem failed validation against DIR/ca-cert.pem: The certificate hasn't got a known issuer"
                ),
            ),
            (
                "is-ca",
                "ca",
                format!(
                    "The certificate DIR/{side}-cert.pem basic constraints show a CA, but we need one for a {side}"
                ),
            ),
            (
                "usage",
                "ca",
                format!("Certificate DIR/{side}-cert.pem usage does not permit key encipherment"),
            ),
            (
                "purpose",
                "ca",
                format!(
                    "Certificate DIR/{side}-cert.pem purpose does not allow use with a TLS {side}"
                ),
            ),
            (
                "mixed",
                "ca",
                format!("{pair} The certificate and the given key do not match."),
            ),
            (
                "no-key",
                "ca",
                format!("{pair} The requested data were not available."),
            ),
            (
                "garbage",
                "ca",
                format!(
                    "Unable to import {side} certificate DIR/{side}-cert.pem: Base64 unexpected header error."
                ),
            ),
            (
                "server",
                "garbage",
                "Unable to import CA certificate list DIR/ca-cert.pem".to_owned(),
            ),
            (
                "server",
                "server",
                "The certificate DIR/ca-cert.pem basic constraints do not show a CA".to_owned(),
            ),
        ] {
            let refused = all.load(endpoint, Some(own), ca).err();
            assert_eq!(refused, Some(expected));
        }
    }
    let missing = all.load(Endpoint::Server, None, "ca").err();
    let text = "Unable to access credentials DIR/server-cert.pem: No such file or directory";
    assert_eq!(missing.as_deref(), Some(text));
    let priority = |spec: &mut X509Spec| spec.priority = Some("NORMAL:-VERS-TLS1.3".to_owned());
    let refused = all.load_with(Endpoint::Client, None, "ca", priority).err();
    assert!(refused.is_some_and(|text| text.contains("is not supported")));
    let normal = |spec: &mut X509Spec| spec.priority = Some("NORMAL".to_owned());
    assert!(all.load_with(Endpoint::Client, None, "ca", normal).is_ok());
    assert_eq!(
        Credentials::load(X509Spec::default()).err().as_deref(),
        Some("Missing 'dir' property value")
    );
}

#[test]
fn what_is_no_hello_is_a_fault_and_is_answered() {
    if !has_openssl() {
        return;
    }
    let all = Authority::new();
    let server = all
        .load(Endpoint::Server, Some("server"), "ca")
        .expect("good");
    for garbage in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0xff; 100],
        b"IHAVEOPT\0\0\0\x07\0\0\0\0",
    ] {
        let mut session = Session::server(server.accept().expect("a server"));
        let mut plain = [0; 64];
        let received = session.receive(garbage, &mut plain);
        assert!(received.is_err(), "{received:?}");
        let mut answer = Vec::new();
        session.output(&mut answer).expect("an alert");
        assert!(!answer.is_empty());
    }
}

#[test]
fn bytes_arrive_whole_in_whatever_pieces_they_travel() {
    if !has_openssl() {
        return;
    }
    let all = Authority::new();
    let server = all
        .load(Endpoint::Server, Some("server"), "ca")
        .expect("good");
    let client = all
        .load(Endpoint::Client, Some("client"), "ca")
        .expect("good");
    let arrive = |lengths: Vec<usize>, step: usize, room: usize| {
        let mut wire = Wire::new(&client, &server, Some("localhost"));
        wire.shake_hands(step).expect("both are good");
        let mut sent = Vec::new();
        for (number, length) in lengths.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
            wire.client.send(&bytes, &mut wire.to_server).expect("sent");
            sent.extend(bytes);
        }
        wire.client.close();
        wire.client.output(&mut wire.to_server).expect("closed");
        let mut received: Vec<u8> = Vec::new();
        let mut plain = vec![0; room];
        loop {
            let given = step.min(wire.to_server.len());
            let got = wire.server.receive(&wire.to_server[..given], &mut plain);
            let got = got.expect("it is what was sent");
            wire.to_server.drain(..got.taken);
            received.extend(&plain[..got.plain]);
            if got.ended {
                break;
            }
            assert!(got.taken + got.plain > 0, "it goes on");
        }
        assert!(wire.to_server.is_empty());
        assert!(received == sent);
    };
    arrive(vec![], 1, 1);
    arrive(vec![1, 100_000, 0, 16_384, 16_385], 1 << 20, 1 << 20);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(24));
    let cases = (
        proptest::collection::vec(0_usize..40_000, 0..5),
        1_usize..5000,
        1_usize..5000,
    );
    let run = runner.run(&cases, |(lengths, step, room)| {
        arrive(lengths, step, room);
        Ok(())
    });
    run.expect("bytes arrive");
}
