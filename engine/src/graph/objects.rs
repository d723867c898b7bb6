//! Objects of clients by id: made, looked at, changed, deleted. Their paths are those of QEMU's object tree, as far as it is there.

use std::sync::Arc;

use crate::error::EngineError;
use crate::graph::host_files::in_background;
use crate::graph::{Graph, names};
use crate::reply::{PropertyValue, PropertyView};
use crate::request::{Authorization, EventLoopSpec, GivenValue, ObjectKind, ObjectSpec, X509Spec};
use crate::throttle::group::ThrottleGroup;
use crate::throttle::limits::{Counted, Limits};
use crate::tls::authorization::Authorizations;
use crate::tls::credentials::Credentials;

/// What there is, in the order in which it was made.
#[derive(Default)]
pub(super) struct Objects {
    list: Vec<(String, Object)>,
    /// Those that say who may come in, again.
    authorizations: Authorizations,
}

/// One of them.
#[derive(Clone)]
enum Object {
    /// A data thread, known to the set of threads under its id, and how its event loop would be tuned if it were QEMU's.
    Iothread(EventLoopSpec),
    ThrottleGroup(Arc<ThrottleGroup>),
    Credentials(Arc<Credentials>),
    Authorization(Authorization),
}

/// Where a path leads.
enum Place {
    Root,
    Container,
    Object(String, Object),
}

/// What clients can see of the object tree besides the objects.
const CONTAINER: &str = "objects";

impl Objects {
    fn find(&self, id: &str) -> Option<&Object> {
        let found = self.list.iter().find(|(known, _)| known == id);
        found.map(|(_, object)| object)
    }

    fn find_mut(&mut self, id: &str) -> Option<&mut Object> {
        let found = self.list.iter_mut().find(|(known, _)| known == id);
        found.map(|(_, object)| object)
    }

    /// The group with an id.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn throttle_group(&self, id: &str) -> Result<Arc<ThrottleGroup>, EngineError> {
        match self.find(id) {
            Some(Object::ThrottleGroup(group)) => Ok(group.clone()),
            _ => {
                let text = format!("Throttle group '{id}' does not exist");
                Err(EngineError::generic(text))
            }
        }
    }

    /// The secrets with an id.
    ///
    /// # Errors
    /// In QEMU's words.
    fn credentials(&self, id: &str) -> Result<Arc<Credentials>, EngineError> {
        match self.find(id) {
            Some(Object::Credentials(credentials)) => Ok(credentials.clone()),
            Some(_) => Err(EngineError::generic(format!(
                "Object with id '{id}' is not TLS credentials"
            ))),
            None => Err(EngineError::generic(format!(
                "No TLS credentials with id '{id}'"
            ))),
        }
    }

    /// What a path leads to: from the root if it begins with a slash, else from anywhere.
    ///
    /// # Errors
    /// In QEMU's words.
    fn at(&self, path: &str) -> Result<Place, EngineError> {
        let found = self.look_up(path);
        found.map_err(|_| EngineError::device_not_found(path))
    }

    /// The same; the error tells whether the path is ambiguous.
    fn look_up(&self, path: &str) -> Result<Place, bool> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let object = |id: &str| {
            let found = self.find(id).cloned();
            found.map(|object| Place::Object(id.to_owned(), object))
        };
        let below_root = match parts[..] {
            [] if !path.is_empty() => Some(Place::Root),
            [CONTAINER] => Some(Place::Container),
            [CONTAINER, id] => object(id),
            _ => None,
        };
        let anywhere = match parts[..] {
            [id] if !path.starts_with('/') => object(id),
            _ => None,
        };
        match (below_root, anywhere) {
            (Some(place), None) | (None, Some(place)) => Ok(place),
            (None, None) => Err(path.is_empty()),
            (Some(_), Some(_)) => Err(true),
        }
    }
}

impl Object {
    const fn type_name(&self) -> &'static str {
        match self {
            Object::Iothread(_) => "iothread",
            Object::ThrottleGroup(_) => "throttle-group",
            Object::Credentials(_) => "tls-creds-x509",
            Object::Authorization(Authorization::Simple { .. }) => "authz-simple",
            Object::Authorization(Authorization::List { .. }) => "authz-list",
        }
    }
}

impl Graph {
    /// The secrets with an id, for whoever connects or is connected to.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn credentials(&self, id: &str) -> Result<Arc<Credentials>, EngineError> {
        self.objects.borrow().credentials(id)
    }

    /// Who may come in, as of whenever it is asked.
    pub fn authorizations(&self) -> Authorizations {
        self.objects.borrow().authorizations.clone()
    }

    /// Creates an object. Secrets are read before it is there.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn add_object(&self, spec: ObjectSpec) -> Result<(), EngineError> {
        if !names::is_identifier(&spec.id) {
            return Err(EngineError::generic("Parameter 'id' expects an identifier"));
        }
        let is_known = self.objects.borrow().find(&spec.id).is_some();
        let duplicate = || {
            EngineError::generic(format!(
                "attempt to add duplicate property '{}' to object (type 'container')",
                spec.id
            ))
        };
        let object = match &spec.kind {
            ObjectKind::Iothread(_) | ObjectKind::X509(_) if is_known => return Err(duplicate()),
            ObjectKind::Iothread(event_loop) => {
                self.threads.add_named(&spec.id)?;
                Object::Iothread(*event_loop)
            }
            ObjectKind::ThrottleGroup(limits) => {
                let limits = Limits::new(limits).map_err(EngineError::generic)?;
                Object::ThrottleGroup(ThrottleGroup::new(spec.id.clone(), limits))
            }
            ObjectKind::X509(x509) => {
                let x509 = (**x509).clone();
                let loading = in_background(move || Ok(Credentials::load(x509)));
                let loaded = loading.await;
                let loaded = loaded.map_err(|error| EngineError::generic(error.to_string()))?;
                Object::Credentials(Arc::new(loaded.map_err(EngineError::generic)?))
            }
            ObjectKind::OtherCredentials(kind) => {
                return Err(EngineError::generic(format!(
                    "Object type '{kind}' is not supported: connections are encrypted with \
                     certificates only, by tls-creds-x509"
                )));
            }
            ObjectKind::Authorization(authorization) => {
                Object::Authorization(authorization.clone())
            }
        };
        let mut objects = self.objects.borrow_mut();
        // Others may have been faster.
        if is_known || objects.find(&spec.id).is_some() {
            return Err(duplicate());
        }
        if let Object::Authorization(authorization) = &object {
            objects.authorizations.set(&spec.id, Some(authorization));
        }
        objects.list.push((spec.id, object));
        Ok(())
    }

    /// Deletes an object. Nodes on the thread of one move to the engine's own.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, jobs run on its thread, or nodes belong to it.
    pub async fn delete_object(&self, id: &str) -> Result<(), EngineError> {
        let held = self.hold().await;
        let object = self.objects.borrow().find(id).cloned();
        match object {
            None => return Err(EngineError::generic(format!("object '{id}' not found"))),
            Some(Object::Iothread(_)) => self.delete_thread(held, id).await?,
            Some(Object::ThrottleGroup(group)) if self.records.borrow().is_throttled_by(&group) => {
                return Err(in_use(id));
            }
            // Who uses the others keeps what he has.
            Some(_) => {}
        }
        let mut objects = self.objects.borrow_mut();
        objects.authorizations.set(id, None);
        objects.list.retain(|(known, _)| known != id);
        Ok(())
    }

    /// What an object has, or what is below a place of the tree.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn properties(&self, path: &str) -> Result<Vec<PropertyView>, EngineError> {
        let objects = self.objects.borrow();
        let place = objects.look_up(path).map_err(|ambiguous| match ambiguous {
            true => EngineError::generic(format!("Path '{path}' is ambiguous")),
            false => EngineError::device_not_found(path),
        })?;
        let mut list = vec![property("type", "string")];
        match place {
            Place::Root => list.push(property(CONTAINER, "child<container>")),
            Place::Container => list.extend(objects.list.iter().map(|(id, object)| {
                let kind = format!("child<{}>", object.type_name());
                property(id, &kind)
            })),
            Place::Object(_, Object::Iothread(_)) => {
                list.extend(EventLoopSpec::NAMES.map(|name| property(name, "int")));
            }
            Place::Object(_, Object::ThrottleGroup(_)) => {
                list.extend(limit_properties().map(|(name, _)| property(&name, "int")));
                list.push(property(LIMITS, "ThrottleLimits"));
            }
            Place::Object(_, Object::Credentials(_)) => {
                list.extend(X509_PROPERTIES.map(|(name, kind)| property(name, kind)));
            }
            Place::Object(_, Object::Authorization(Authorization::Simple { .. })) => {
                list.push(property("identity", "string"));
            }
            Place::Object(_, Object::Authorization(Authorization::List { .. })) => {
                list.push(property("policy", "QAuthZListPolicy"));
                list.push(property("rules", "QAuthZListRule"));
            }
        }
        Ok(list)
    }

    /// The value of a property.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn property(&self, path: &str, name: &str) -> Result<PropertyValue, EngineError> {
        let objects = self.objects.borrow();
        let (kind, value) = match objects.at(path)? {
            Place::Root => {
                let value = (name == CONTAINER).then(|| PropertyValue::Text(format!("/{name}")));
                ("container", value)
            }
            Place::Container => {
                let found = objects.find(name);
                let value = found.map(|_| PropertyValue::Text(format!("/{CONTAINER}/{name}")));
                ("container", value)
            }
            Place::Object(_, object) => (object.type_name(), object.property(name)),
        };
        match value {
            Some(value) => Ok(value),
            None if name == "type" => Ok(PropertyValue::Text(kind.to_owned())),
            None => Err(no_property(kind, name)),
        }
    }

    /// Gives a property another value.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn set_property(
        &self,
        path: &str,
        name: &str,
        value: GivenValue,
    ) -> Result<(), EngineError> {
        let mut objects = self.objects.borrow_mut();
        let (kind, exists) = match objects.at(path)? {
            Place::Root => ("container", name == CONTAINER),
            Place::Container => ("container", objects.find(name).is_some()),
            Place::Object(id, object) => {
                let kind = object.type_name();
                let exists = object.property(name).is_some();
                if exists && let Some(object) = objects.find_mut(&id) {
                    object.set_property(name, value)?;
                    if let Object::Authorization(now) = object {
                        let now = now.clone();
                        objects.authorizations.set(&id, Some(&now));
                    }
                    return Ok(());
                }
                (kind, false)
            }
        };
        match exists || name == "type" {
            true => Err(EngineError::generic(format!(
                "Property '{kind}.{name}' is not writable"
            ))),
            false => Err(no_property(kind, name)),
        }
    }
}

impl Object {
    fn property(&self, name: &str) -> Option<PropertyValue> {
        match self {
            Object::Iothread(event_loop) => event_loop.value(name).map(PropertyValue::Int),
            Object::ThrottleGroup(group) if name == LIMITS => {
                Some(PropertyValue::Limits(Box::new(group.limits())))
            }
            Object::ThrottleGroup(group) => {
                let limits = group.limits();
                let found = limit_properties().find(|(known, _)| known == name);
                let value = found.map(|(_, value)| value(&limits));
                value.map(|value| PropertyValue::Int(value.cast_signed()))
            }
            Object::Credentials(credentials) => x509_property(credentials.spec(), name),
            Object::Authorization(Authorization::Simple { identity }) => {
                (name == "identity").then(|| PropertyValue::Text(identity.clone()))
            }
            Object::Authorization(Authorization::List {
                rules,
                allows_others,
            }) => match name {
                "policy" => Some(PropertyValue::Text(policy(*allows_others).to_owned())),
                "rules" => Some(PropertyValue::Rules(rules.clone())),
                _ => None,
            },
        }
    }

    fn set_property(&mut self, name: &str, value: GivenValue) -> Result<(), EngineError> {
        match self {
            Object::Iothread(event_loop) => event_loop.set(name, value.int?),
            Object::ThrottleGroup(group) if name == LIMITS => {
                let changed = group.change_limits(&*value.limits?);
                changed.map_err(EngineError::generic)
            }
            Object::Authorization(Authorization::Simple { identity }) => {
                *identity = value.text?;
                Ok(())
            }
            Object::Authorization(Authorization::List { rules, .. }) if name == "rules" => {
                *rules = value.rules?;
                Ok(())
            }
            Object::Authorization(Authorization::List { allows_others, .. }) => {
                let text = value.text?;
                *allows_others = match text.as_str() {
                    "allow" => true,
                    "deny" => false,
                    _ => {
                        let text = format!("Parameter 'policy' does not accept value '{text}'");
                        return Err(EngineError::generic(text));
                    }
                };
                Ok(())
            }
            // QEMU takes them, and does nothing with them.
            Object::Credentials(_) | Object::ThrottleGroup(_) => Err(EngineError::generic(
                "Property cannot be set after initialization",
            )),
        }
    }
}

/// Properties of certificates and keys, and their types.
const X509_PROPERTIES: [(&str, &str); 6] = [
    ("endpoint", "QCryptoTLSCredsEndpoint"),
    ("dir", "string"),
    ("verify-peer", "bool"),
    ("priority", "string"),
    ("sanity-check", "bool"),
    ("passwordid", "string"),
];

fn x509_property(spec: &X509Spec, name: &str) -> Option<PropertyValue> {
    let text = |text: &Option<String>| PropertyValue::Text(text.clone().unwrap_or_default());
    Some(match name {
        "endpoint" => PropertyValue::Text(spec.endpoint.name().to_owned()),
        "dir" => text(&spec.dir),
        "verify-peer" => PropertyValue::Flag(spec.verify_peer),
        "priority" => text(&spec.priority),
        "sanity-check" => PropertyValue::Flag(spec.sanity_check),
        "passwordid" => text(&spec.password_id),
        _ => return None,
    })
}

const fn policy(allows: bool) -> &'static str {
    match allows {
        true => "allow",
        false => "deny",
    }
}

const LIMITS: &str = "limits";

type LimitOf = Box<dyn Fn(&Limits) -> u64>;

/// Names of the properties that are one limit each, and what they show.
fn limit_properties() -> impl Iterator<Item = (String, LimitOf)> {
    let rates = Counted::ALL.into_iter().flat_map(|counted| {
        let name = counted.name();
        let average: LimitOf = Box::new(move |limits| limits.rate(counted).average);
        let burst: LimitOf = Box::new(move |limits| limits.rate(counted).burst);
        let length: LimitOf = Box::new(move |limits| limits.rate(counted).burst_seconds);
        [
            (format!("x-{name}"), average),
            (format!("x-{name}-max"), burst),
            (format!("x-{name}-max-length"), length),
        ]
    });
    let size: LimitOf = Box::new(|limits| limits.request_bytes);
    rates.chain([("x-iops-size".to_owned(), size)])
}

/// The text for an object that cannot go.
pub(super) fn in_use(id: &str) -> EngineError {
    EngineError::generic(format!("object '{id}' is in use, can not be deleted"))
}

fn property(name: &str, kind: &str) -> PropertyView {
    PropertyView {
        name: name.to_owned(),
        kind: kind.to_owned(),
    }
}

fn no_property(kind: &str, name: &str) -> EngineError {
    EngineError::generic(format!("Property '{kind}.{name}' not found"))
}
