package storetest

import (
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// undo remembers what a commit replaced.
type undo struct {
	store       *Memory
	incarnation uint64
	epoch       uint64
	segments    map[kms.SegmentID]*memSegment
	links       map[kms.LinkID]*memLink
	memories    map[etsi014.KMEID]*kms.Memory
}

func (u *undo) segment(id kms.SegmentID) {
	if _, ok := u.segments[id]; ok {
		return
	}
	if u.segments == nil {
		u.segments = map[kms.SegmentID]*memSegment{}
	}
	u.segments[id] = nil
	if seg := u.store.segments[id]; seg != nil {
		u.segments[id] = seg.clone()
	}
}

func (u *undo) link(id kms.LinkID) *memLink {
	if u.links == nil {
		u.links = map[kms.LinkID]*memLink{}
	}
	now := u.store.links[id]
	if _, ok := u.links[id]; !ok {
		u.links[id] = nil
		if now != nil {
			l := *now
			u.links[id] = &l
		}
	}
	if now == nil {
		now = &memLink{}
		u.store.links[id] = now
	}
	return now
}

func (u *undo) back() {
	u.store.incarnation, u.store.epoch = u.incarnation, u.epoch
	for id, seg := range u.segments {
		if seg == nil {
			delete(u.store.segments, id)
		} else {
			u.store.segments[id] = seg
		}
	}
	for id, l := range u.links {
		if l == nil {
			delete(u.store.links, id)
		} else {
			u.store.links[id] = l
		}
	}
	for id, m := range u.memories {
		if m == nil {
			delete(u.store.memories, id)
		} else {
			u.store.memories[id] = *m
		}
	}
}

func (u *undo) memory(id etsi014.KMEID) {
	if u.memories == nil {
		u.memories = map[etsi014.KMEID]*kms.Memory{}
	}
	if _, ok := u.memories[id]; ok {
		return
	}
	u.memories[id] = nil
	if m, ok := u.store.memories[id]; ok {
		u.memories[id] = &m
	}
}
