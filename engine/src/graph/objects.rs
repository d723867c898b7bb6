//! Objects of clients by id: made, looked at, changed, deleted. Their paths are those of QEMU's object tree, as far as it is there.

use std::sync::Arc;

use crate::error::EngineError;
use crate::graph::{Graph, names};
use crate::reply::{PropertyValue, PropertyView};
use crate::request::{EventLoopSpec, GivenValue, ObjectKind, ObjectSpec};
use crate::throttle::group::ThrottleGroup;
use crate::throttle::limits::{Counted, Limits};

/// What there is, in the order in which it was made.
#[derive(Default)]
pub(super) struct Objects {
    list: Vec<(String, Object)>,
}

/// One of them.
#[derive(Clone)]
enum Object {
    /// A data thread, known to the set of threads under its id, and how its event loop would be tuned if it were QEMU's.
    Iothread(EventLoopSpec),
    ThrottleGroup(Arc<ThrottleGroup>),
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
        }
    }
}

impl Graph {
    /// Creates an object.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn add_object(&self, spec: ObjectSpec) -> Result<(), EngineError> {
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
            ObjectKind::Iothread(_) if is_known => return Err(duplicate()),
            ObjectKind::Iothread(event_loop) => {
                self.threads.add_named(&spec.id)?;
                Object::Iothread(*event_loop)
            }
            ObjectKind::ThrottleGroup(limits) => {
                let limits = Limits::new(limits).map_err(EngineError::generic)?;
                Object::ThrottleGroup(ThrottleGroup::new(spec.id.clone(), limits))
            }
        };
        if is_known {
            return Err(duplicate());
        }
        self.objects.borrow_mut().list.push((spec.id, object));
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
            Some(Object::ThrottleGroup(_)) => {}
        }
        let mut objects = self.objects.borrow_mut();
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
                    return object.set_property(name, value);
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
        }
    }

    fn set_property(&mut self, name: &str, value: GivenValue) -> Result<(), EngineError> {
        match self {
            Object::Iothread(event_loop) => event_loop.set(name, value.int?),
            Object::ThrottleGroup(group) if name == LIMITS => {
                let changed = group.change_limits(&*value.limits?);
                changed.map_err(EngineError::generic)
            }
            Object::ThrottleGroup(_) => Err(EngineError::generic(
                "Property cannot be set after initialization",
            )),
        }
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
