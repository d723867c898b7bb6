//! Certificates, keys and lists of who may come in as objects on both daemons: what is wrong with them is told in the same words.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::chains::with;
use crate::oracle::compare;
use crate::tools;

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn object(kind: &str, id: &str, more: Value) -> String {
    let object = json!({"qom-type": kind, "id": id});
    line("object-add", &with(object, more))
}

fn read(path: &str, property: &str) -> String {
    line("qom-get", &json!({"path": path, "property": property}))
}

fn write(path: &str, property: &str, value: Value) -> String {
    let arguments = json!({"path": path, "property": property, "value": value});
    line("qom-set", &arguments)
}

fn openssl(folder: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {said}");
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

/// An authority, and certificates that it or another one has signed.
pub(crate) fn certificates(folder: &Path) {
    for name in ["ca", "other"] {
        let made =
            format!("req -x509 {KEY} -keyout {name}-key -out {name} -subj /CN={name} -days 2");
        openssl(folder, &made);
    }
    let usage =
        "keyUsage=digitalSignature,keyEncipherment\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n";
    for (name, subject, signer, extensions) in [
        ("server", "/CN=localhost", "ca", usage),
        ("client", "/C=GB/O=Example/CN=laptop", "ca", usage),
        ("foreign", "/CN=laptop", "other", usage),
        ("is-ca", "/CN=laptop", "ca", "basicConstraints=CA:true\n"),
        (
            "usage",
            "/CN=laptop",
            "ca",
            "keyUsage=critical,digitalSignature\n",
        ),
    ] {
        sign(folder, (name, subject), signer, extensions);
    }
    std::fs::write(folder.join("garbage"), "garbage").expect("written");
}

/// One more certificate that the authority has signed.
pub(crate) fn signed(folder: &Path, name: &str, subject: &str, extensions: &str) {
    sign(folder, (name, subject), "ca", extensions);
}

fn sign(folder: &Path, (name, subject): (&str, &str), signer: &str, extensions: &str) {
    std::fs::write(folder.join("extensions"), extensions).expect("written");
    openssl(
        folder,
        &format!("req {KEY} -keyout {name}-key -out request -subj {subject}"),
    );
    openssl(
        folder,
        &format!(
            "x509 -req -in request -CA {signer} -CAkey {signer}-key -CAcreateserial -out {name} \
             -extfile extensions -days 2"
        ),
    );
}

/// A folder with some of them under the names that they are looked for.
pub(crate) fn layout(folder: &Path, name: &str, files: &[(&str, &str)]) {
    let to = folder.join(name);
    std::fs::create_dir(&to).expect("made");
    for (file, from) in files {
        std::fs::copy(folder.join(from), to.join(format!("{file}.pem"))).expect("copied");
    }
}

/// Every layout, good and bad, for both sides.
fn layouts(endpoint: &str) -> Vec<(String, Vec<(String, &'static str)>)> {
    let mut layouts = Vec::new();
    for (certificate, key, authority) in [
        (endpoint, format!("{endpoint}-key"), "ca"),
        ("foreign", "foreign-key".to_owned(), "ca"),
        ("is-ca", "is-ca-key".to_owned(), "ca"),
        ("usage", "usage-key".to_owned(), "ca"),
        ("foreign", format!("{endpoint}-key"), "other"),
        ("garbage", format!("{endpoint}-key"), "ca"),
        (endpoint, "garbage".to_owned(), "ca"),
        (endpoint, format!("{endpoint}-key"), "garbage"),
        (endpoint, format!("{endpoint}-key"), "server"),
        ("", format!("{endpoint}-key"), "ca"),
        (endpoint, String::new(), "ca"),
        ("", String::new(), "ca"),
        (endpoint, format!("{endpoint}-key"), ""),
    ] {
        let leak = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
        let files = [
            ("ca-cert".to_owned(), authority),
            (format!("{endpoint}-cert"), leak(certificate.to_owned())),
            (format!("{endpoint}-key"), leak(key)),
        ];
        let files = files.into_iter().filter(|(_, from)| !from.is_empty());
        let name = format!("{endpoint}{}", layouts.len());
        layouts.push((name, files.collect()));
    }
    layouts
}

#[test]
fn what_is_wrong_with_certificates_is_told_in_the_same_words() {
    if !tools::have("openssl", "openssl") {
        return;
    }
    let mut script = object("tls-creds-x509", "c", json!({}));
    for more in [
        json!({"dir": "none"}),
        json!({"dir": ""}),
        json!({"dir": 1}),
        json!({"endpoint": "other"}),
        json!({"verify-peer": 1}),
        json!({"passwordid": "none"}),
        json!({"dir": "server0", "endpoint": "server", "passwordid": "none"}),
    ] {
        script += &object("tls-creds-x509", "c", more);
    }
    for endpoint in ["server", "client"] {
        for (dir, _) in layouts(endpoint) {
            let more = json!({"dir": dir, "endpoint": endpoint});
            script += &object("tls-creds-x509", &dir, more);
        }
    }
    let more = json!({"dir": "server0", "endpoint": "server", "sanity-check": false, "priority": "NORMAL"});
    script += &object("tls-creds-x509", "s", more.clone());
    script += &object("tls-creds-x509", "s", more);
    for property in [
        "endpoint",
        "dir",
        "verify-peer",
        "priority",
        "sanity-check",
        "passwordid",
        "loaded",
    ] {
        script += &read("/objects/s", property);
    }
    script += &line("qom-list", &json!({"path": "s"}));
    script += &line("object-del", &json!({"id": "s"}));
    compare(&script, |folder| {
        certificates(folder);
        for endpoint in ["server", "client"] {
            for (name, files) in layouts(endpoint) {
                let files: Vec<(&str, &str)> = files
                    .iter()
                    .map(|(file, from)| (file.as_str(), *from))
                    .collect();
                layout(folder, &name, &files);
            }
        }
    });
}

#[test]
fn lists_of_who_may_come_in_are_the_same() {
    let rule = |name: &str, policy: &str| json!({"match": name, "policy": policy});
    let mut script = String::new();
    for (kind, id, more) in [
        ("authz-simple", "s", json!({})),
        ("authz-simple", "s", json!({"identity": 1})),
        ("authz-simple", "s", json!({"identity": "CN=x"})),
        ("authz-list", "l0", json!({})),
        ("authz-list", "l1", json!({"policy": "other"})),
        ("authz-list", "l1", json!({"rules": 1})),
        ("authz-list", "l1", json!({"rules": [rule("x", "other")]})),
        ("authz-list", "l1", json!({"rules": [{"match": "x"}]})),
        ("authz-list", "l1", json!({"rules": [{"policy": "deny"}]})),
        (
            "authz-list",
            "l1",
            json!({"policy": "allow", "rules": [
                rule("CN=eve", "deny"),
                with(rule("CN=*", "allow"), json!({"format": "glob"})),
                with(rule("CN=bob", "allow"), json!({"format": "exact"})),
            ]}),
        ),
        ("authz-list-file", "f", json!({"filename": "none"})),
    ] {
        script += &object(kind, id, more);
    }
    for (path, property) in [("s", "identity"), ("l0", "policy")] {
        for value in [
            json!(1),
            json!("deny"),
            json!("other"),
            json!([]),
            json!(null),
        ] {
            script += &read(path, property);
            script += &write(path, property, value);
        }
        script += &read(path, property);
    }
    for path in ["l0", "l1"] {
        script += &read(path, "rules");
        // A list that was refused is none on QEMU's side.
        for value in [
            json!(1),
            json!("deny"),
            json!([{"match": 1}]),
            json!([rule("x", "other")]),
        ] {
            script += &write(path, "rules", value);
        }
        for value in [json!([rule("CN=z", "allow")]), json!([])] {
            script += &write(path, "rules", value);
            script += &read(path, "rules");
        }
    }
    for path in ["s", "l0"] {
        script += &line("qom-list", &json!({"path": path}));
        script += &line("object-del", &json!({"id": path}));
    }
    compare(&script, |_| {});
}

#[test]
fn what_is_no_certificate_is_refused_clearly() {
    let daemon = crate::daemon::Daemon::start();
    let mut client = daemon.client();
    for kind in ["tls-creds-anon", "tls-creds-psk"] {
        let object = json!({"qom-type": kind, "id": "c", "dir": "."});
        assert_eq!(
            client.refusal("object-add", object),
            format!(
                "Object type '{kind}' is not supported: connections are encrypted with \
                 certificates only, by tls-creds-x509"
            )
        );
    }
    daemon.quit();
}
