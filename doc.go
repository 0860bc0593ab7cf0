// Package acproxy holds the words that every part of acproxy shares: what an image is called, how its bytes are named, and the ways in
// which asking for it can fail.
//
// acproxy is an image discovery and caching registry proxy for appc images. The words follow the App Container specification
// (https://github.com/appc/spec, version 0.8.11) and, where they touch HTTP and OpenPGP, the RFCs named beside them.
package acproxy
