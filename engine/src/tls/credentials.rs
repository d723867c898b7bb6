//! [`Credentials`]: certificates and keys as they lie in a folder, under the names that QEMU gives them, looked at before anybody
//! relies on them. Refusals are in QEMU's order and words.
//!
//! Reads files, so it is not for the manager's thread.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use blockyard_storage::error::errno_text;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Error, InconsistentKeys, RootCertStore,
    ServerConfig, ServerConnection,
};

use crate::tls::certificate::{Certificate, Usage};
use crate::tls::verifiers::ServerVerifier;

/// Longest file, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Which side uses credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Endpoint {
    /// It connects.
    #[default]
    Client,
    /// It is connected to.
    Server,
}

impl Endpoint {
    /// How clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Endpoint::Client => "client",
            Endpoint::Server => "server",
        }
    }
}

/// What a client says of credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct X509Spec {
    /// Folder of the files.
    pub dir: Option<String>,
    /// Which side uses them.
    pub endpoint: Endpoint,
    /// Whether the other side has to show a certificate that was signed by whom we trust.
    pub verify_peer: bool,
    /// Whether our own certificate is looked at first.
    pub sanity_check: bool,
    /// Algorithms, as GnuTLS is told.
    pub priority: Option<String>,
    /// Secret with the password of the key.
    pub password_id: Option<String>,
}

impl Default for X509Spec {
    fn default() -> Self {
        Self {
            dir: None,
            endpoint: Endpoint::default(),
            verify_peer: true,
            sanity_check: true,
            priority: None,
            password_id: None,
        }
    }
}

/// Credentials, ready for connections.
pub struct Credentials {
    spec: X509Spec,
    side: Side,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Credentials");
        shown.field("spec", &self.spec).finish_non_exhaustive()
    }
}

enum Side {
    Client {
        /// Where the server's name is known.
        named: Arc<ClientConfig>,
        unnamed: Arc<ClientConfig>,
    },
    Server(Arc<ServerConfig>),
}

/// What of QEMU's priorities asks for no more than every connection has here.
const PRIORITIES: &[&str] = &[
    "",
    "NORMAL",
    "SECURE",
    "SECURE128",
    "@SYSTEM",
    "@QEMU",
    "@QEMU,SYSTEM",
    "@QEMU,NORMAL",
];

impl Credentials {
    /// Reads and checks what is in the folder.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn load(spec: X509Spec) -> Result<Self, String> {
        let Some(dir) = &spec.dir else {
            return Err("Missing 'dir' property value".to_owned());
        };
        let priority = spec.priority.as_deref().unwrap_or_default();
        if !PRIORITIES.contains(&priority) {
            return Err(format!(
                "Priority '{priority}' is not supported: TLS 1.2 and 1.3 are offered with what is \
                 considered safe; leave it out"
            ));
        }
        let files = Files::find(Path::new(dir), spec.endpoint)?;
        let loaded = Loaded::read(&files, &spec)?;
        if spec.sanity_check {
            loaded.check(&files, spec.endpoint)?;
        }
        if let Some(id) = &spec.password_id {
            return Err(format!("No secret with id '{id}'"));
        }
        let provider = Arc::new(ring::default_provider());
        let side = match spec.endpoint {
            Endpoint::Client => loaded.client(&files, &spec, &provider)?,
            Endpoint::Server => Side::Server(loaded.server(&files, &spec, provider)?),
        };
        Ok(Self { spec, side })
    }

    /// What they were made of.
    pub fn spec(&self) -> &X509Spec {
        &self.spec
    }

    /// How to receive clients.
    ///
    /// # Errors
    /// In QEMU's words: they are for the other side.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, String> {
        match &self.side {
            Side::Server(config) => Ok(config.clone()),
            Side::Client { .. } => Err("Expected TLS credentials for a server endpoint".to_owned()),
        }
    }

    /// A new connection from a client.
    ///
    /// # Errors
    /// As [`server_config`](Self::server_config).
    pub fn accept(&self) -> Result<ServerConnection, String> {
        let connection = ServerConnection::new(self.server_config()?);
        connection.map_err(|error| error.to_string())
    }

    /// That they are for connecting.
    ///
    /// # Errors
    /// In QEMU's words: they are for the other side.
    pub fn check_client(&self) -> Result<(), String> {
        match &self.side {
            Side::Client { .. } => Ok(()),
            Side::Server(_) => Err("Expected TLS credentials for a client endpoint".to_owned()),
        }
    }

    /// A new connection to a server, which has to be called so; `None`: however it is called.
    ///
    /// # Errors
    /// In QEMU's words: they are for the other side, or no certificate can have that name.
    pub fn connect(&self, hostname: Option<&str>) -> Result<ClientConnection, String> {
        let Side::Client { named, unnamed } = &self.side else {
            return Err("Expected TLS credentials for a client endpoint".to_owned());
        };
        let config = if hostname.is_some() { named } else { unnamed };
        let hostname = hostname.unwrap_or("localhost").to_owned();
        let name = ServerName::try_from(hostname.clone())
            .map_err(|_| format!("Certificate does not match the hostname {hostname}"))?;
        let connection = ClientConnection::new(config.clone(), name);
        connection.map_err(|error| error.to_string())
    }
}

/// Files that are there.
struct Files {
    ca: PathBuf,
    crl: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Files {
    fn find(dir: &Path, endpoint: Endpoint) -> Result<Self, String> {
        let is_server = endpoint == Endpoint::Server;
        let place = |name: &str| match dir.as_os_str().is_empty() {
            // As QEMU makes paths.
            true => Path::new("/").join(name),
            false => dir.join(name),
        };
        let there = |name: &str, is_needed: bool| {
            let path = place(name);
            match path.metadata() {
                Ok(_) => Ok(Some(path)),
                Err(error) if is_needed || error.kind() != io::ErrorKind::NotFound => Err(format!(
                    "Unable to access credentials {}: {}",
                    path.display(),
                    reason(&error)
                )),
                Err(_) => Ok(None),
            }
        };
        let name = endpoint.name();
        let ca = place("ca-cert.pem");
        there("ca-cert.pem", true)?;
        Ok(Self {
            ca,
            crl: match is_server {
                true => there("ca-crl.pem", false)?,
                false => None,
            },
            certificate: there(&format!("{name}-cert.pem"), is_server)?,
            key: there(&format!("{name}-key.pem"), is_server)?,
        })
    }

    fn certificate(&self) -> std::path::Display<'_> {
        self.certificate
            .as_deref()
            .unwrap_or(Path::new(""))
            .display()
    }

    fn key(&self) -> std::path::Display<'_> {
        self.key.as_deref().unwrap_or(Path::new("")).display()
    }
}

/// What stood in the files.
struct Loaded {
    authorities: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    /// Ours, with those that lead to the authority.
    chain: Vec<CertificateDer<'static>>,
}

impl Loaded {
    fn read(files: &Files, spec: &X509Spec) -> Result<Self, String> {
        let endpoint = spec.endpoint.name();
        let chain = match &files.certificate {
            None => Vec::new(),
            Some(path) => {
                let why = |why: &str| {
                    format!(
                        "Unable to import {endpoint} certificate {}: {why}",
                        path.display()
                    )
                };
                let bytes = read(path).map_err(|error| why(&reason(&error)))?;
                let chain = CertificateDer::pem_slice_iter(&bytes);
                let chain: Result<Vec<_>, _> = chain.collect();
                let chain = chain.map_err(|_| why("Base64 decoding error."))?;
                if chain.is_empty() {
                    return Err(why("Base64 unexpected header error."));
                }
                chain
            }
        };
        let bytes = read(&files.ca).map_err(|error| {
            // The quotation marks are GnuTLS's.
            let path = files.ca.display();
            let reason = reason(&error);
            format!("Cannot load CA cert list {path}: Error reading file \u{201c}{path}\u{201d}: {reason}")
        })?;
        let refused = || {
            let path = files.ca.display();
            format!("Unable to import CA certificate list {path}")
        };
        let authorities: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
        let authorities = authorities.map_err(|_| refused())?;
        let mut roots = RootCertStore::empty();
        for authority in &authorities {
            roots.add(authority.clone()).map_err(|_| refused())?;
        }
        if roots.is_empty() {
            return Err(refused());
        }
        Ok(Self {
            authorities,
            roots: Arc::new(roots),
            chain,
        })
    }

    /// That the certificates are what they are used for.
    fn check(&self, files: &Files, endpoint: Endpoint) -> Result<(), String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if let Some(own) = self.chain.first() {
            check_own(own, &files.certificate(), endpoint, seconds)?;
        }
        for authority in &self.authorities {
            check_authority(authority, &files.ca.display(), seconds)?;
        }
        let Some((own, between)) = self.chain.split_first() else {
            return Ok(());
        };
        let algorithms = ring::default_provider().signature_verification_algorithms;
        let parsed = ParsedCertificate::try_from(own);
        let signed = parsed.and_then(|parsed| {
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &self.roots,
                between,
                UnixTime::since_unix_epoch(now),
                algorithms.all,
            )
        });
        let why = match signed {
            Ok(()) => return Ok(()),
            // That it may be used by a server was not asked.
            Err(Error::InvalidCertificate(
                CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
            )) => return Ok(()),
            Err(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
                "The certificate hasn't got a known issuer".to_owned()
            }
            Err(error) => error.to_string(),
        };
        Err(format!(
            "Our own certificate {} failed validation against {}: {why}",
            files.certificate(),
            files.ca.display()
        ))
    }

    fn key(&self, files: &Files) -> Result<PrivateKeyDer<'static>, String> {
        let path = files.key.as_deref().unwrap_or(Path::new(""));
        let bytes = read(path).map_err(|error| key_refused(files, &reason(&error)))?;
        PrivateKeyDer::from_pem_slice(&bytes)
            .map_err(|_| key_refused(files, "The requested data were not available."))
    }

    fn server(
        &self,
        files: &Files,
        spec: &X509Spec,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<ServerConfig>, String> {
        let key = self.key(files)?;
        let mut revoked = Vec::new();
        if let Some(path) = &files.crl {
            let refused = |why: &str| format!("Cannot load CRL '{}': {why}", path.display());
            let bytes = read(path).map_err(|error| refused(&reason(&error)))?;
            let lists = CertificateRevocationListDer::pem_slice_iter(&bytes);
            let lists: Result<Vec<_>, _> = lists.collect();
            revoked = lists.map_err(|_| refused("Base64 decoding error."))?;
            if revoked.is_empty() {
                return Err(refused("Base64 decoding error."));
            }
        }
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| error.to_string())?;
        let builder = match spec.verify_peer {
            false => builder.with_no_client_auth(),
            true => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider)
                        .with_crls(revoked)
                        .allow_unknown_revocation_status()
                        .build();
                let verifier = verifier.map_err(|error| match &files.crl {
                    Some(path) => format!("Cannot load CRL '{}': {error}", path.display()),
                    None => error.to_string(),
                });
                builder.with_client_cert_verifier(verifier?)
            }
        };
        let config = builder.with_single_cert(self.chain.clone(), key);
        let config = config.map_err(|error| mismatch(files, &error))?;
        Ok(Arc::new(config))
    }

    fn client(
        &self,
        files: &Files,
        spec: &X509Spec,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Side, String> {
        let has_key = files.certificate.is_some() && files.key.is_some();
        let key = match has_key {
            true => Some(self.key(files)?),
            false => None,
        };
        let config = |names: bool| {
            let verifier: Arc<dyn ServerCertVerifier> = Arc::new(ServerVerifier {
                roots: spec.verify_peer.then(|| self.roots.clone()),
                names,
                provider: provider.clone(),
            });
            let builder = ClientConfig::builder_with_provider(provider.clone());
            let builder = builder.with_safe_default_protocol_versions();
            let builder = builder.map_err(|error| error.to_string())?;
            let builder = builder
                .dangerous()
                .with_custom_certificate_verifier(verifier);
            let config = match &key {
                None => Ok(builder.with_no_client_auth()),
                Some(key) => builder.with_client_auth_cert(self.chain.clone(), key.clone_key()),
            };
            let mut config = config.map_err(|error| mismatch(files, &error))?;
            config.enable_sni = names;
            Ok::<_, String>(Arc::new(config))
        };
        Ok(Side::Client {
            named: config(true)?,
            unnamed: config(false)?,
        })
    }
}

fn check_own(
    own: &CertificateDer<'_>,
    path: &std::path::Display<'_>,
    endpoint: Endpoint,
    now: i64,
) -> Result<(), String> {
    let name = endpoint.name();
    let certificate = Certificate::read(own);
    let certificate = certificate.ok_or_else(|| {
        format!("Unable to import {name} certificate {path}: ASN1 parser: Error in DER parsing.")
    })?;
    check_times(&certificate, name, path, now)?;
    if certificate.is_ca == Some(true) {
        return Err(format!(
            "The certificate {path} basic constraints show a CA, but we need one for a {name}"
        ));
    }
    if let Some(usage) = certificate.usage.filter(|usage| usage.is_critical) {
        for (bit, what) in [
            (Usage::DIGITAL_SIGNATURE, "digital signature"),
            (Usage::KEY_ENCIPHERMENT, "key encipherment"),
        ] {
            if !usage.allows(bit) {
                return Err(format!("Certificate {path} usage does not permit {what}"));
            }
        }
    }
    let wanted = match endpoint {
        Endpoint::Server => "1.3.6.1.5.5.7.3.1",
        Endpoint::Client => "1.3.6.1.5.5.7.3.2",
    };
    const ANY_PURPOSE: &str = "2.5.29.37.0";
    if let Some((purposes, true)) = &certificate.purposes
        && !purposes
            .iter()
            .any(|one| one == wanted || one == ANY_PURPOSE)
    {
        return Err(format!(
            "Certificate {path} purpose does not allow use with a TLS {name}"
        ));
    }
    Ok(())
}

fn check_authority(
    authority: &CertificateDer<'_>,
    path: &std::path::Display<'_>,
    now: i64,
) -> Result<(), String> {
    let certificate = Certificate::read(authority);
    let certificate =
        certificate.ok_or_else(|| format!("Unable to import CA certificate list {path}"))?;
    check_times(&certificate, "CA", path, now)?;
    match certificate.is_ca {
        Some(true) => {}
        Some(false) => {
            return Err(format!(
                "The certificate {path} basic constraints do not show a CA"
            ));
        }
        None => {
            return Err(format!(
                "The certificate {path} is missing basic constraints for a CA"
            ));
        }
    }
    match certificate.usage.filter(|usage| usage.is_critical) {
        Some(usage) if !usage.allows(Usage::CERTIFICATE_SIGN) => Err(format!(
            "Certificate {path} usage does not permit certificate signing"
        )),
        _ => Ok(()),
    }
}

fn check_times(
    certificate: &Certificate,
    name: &str,
    path: &std::path::Display<'_>,
    now: i64,
) -> Result<(), String> {
    if certificate.not_after < now {
        return Err(format!("The {name} certificate {path} has expired"));
    }
    if certificate.not_before > now {
        return Err(format!("The {name} certificate {path} is not yet active"));
    }
    Ok(())
}

fn key_refused(files: &Files, why: &str) -> String {
    let (certificate, key) = (files.certificate(), files.key());
    format!("Cannot load certificate '{certificate}' & key '{key}': {why}")
}

fn mismatch(files: &Files, error: &Error) -> String {
    match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            key_refused(files, "The certificate and the given key do not match.")
        }
        error => key_refused(files, &error.to_string()),
    }
}

/// All of a file, which has to be a regular one of moderate length.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = path.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(
            blockyard_storage::error::EISDIR,
        ));
    }
    if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
        return Err(io::Error::other("Not a regular file of moderate length"));
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => errno_text(errno),
        None => error.to_string(),
    }
}
